//! The engine against transformers in float32, on a tiny checkpoint of each family.
//!
//! Tolerance: logits have a standard deviation near 1, and both sides add the same few hundred products per element in
//! f32 in a different order, over two or three layers; that moves a logit by up to 1e-5. Rounding an activation to bf16
//! anywhere moves it by 1e-3 and a wrong rotation, bias or norm by more than 1e-2. [`TOLERANCE`] lies between. KV entries
//! are stored in f32 unless a test says otherwise; [`kv_tolerance`] has the bounds for half precision.

mod fixture;

use fixture::{DENSITIES, Fixture, TAIL};
use specattn_engine::{
    CpuIsa, DType, HeadLists, LogitRows, Model, PositionSet, Sequence, Step, StepOutput,
};

/// Absolute, and relative to the reference value.
const TOLERANCE: f32 = 1e-4;

/// Between two runs of the engine over the same values in chunks of different sizes.
const SELF_TOLERANCE: f32 = 2e-5;

/// Absolute and relative, with KV entries rounded to `dtype`: some fifty times its unit roundoff (2^-9 or 2^-12), for values up
/// to about 4 that go through a softmax and several layers.
fn kv_tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => TOLERANCE,
        DType::F16 => 1.25e-2,
        DType::Bf16 => 1e-1,
    }
}

fn assert_close(what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let allowed = tolerance * (1.0 + w.abs());
        // Written so that NaN fails.
        assert!(
            (g - w).abs() <= allowed,
            "{what}: value {i} is {g}, reference {w}"
        );
    }
}

fn assert_same_bits(what: &str, got: &[f32], want: &[f32]) {
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    assert!(bits(got) == bits(want), "{what}: differs in some bit");
}

/// One step of one sequence.
fn step(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    lists: Option<&HeadLists>,
    logits: LogitRows,
    capture: &[usize],
) -> StepOutput {
    let mut outputs = model
        .forward(&mut [Step {
            lists,
            logits,
            capture,
            ..Step::new(sequence, tokens)
        }])
        .expect("a valid step");
    assert_eq!(outputs.len(), 1);
    outputs.remove(0)
}

/// Logits of all `tokens` appended to `sequence`.
fn dense(model: &mut Model, sequence: &mut Sequence, tokens: &[u32]) -> Vec<f32> {
    step(model, sequence, tokens, None, LogitRows::All, &[])
        .logits
        .to_vec()
}

fn all_layers(model: &Model) -> Vec<usize> {
    (0..model.config().num_layers).collect()
}

/// A list of every position below `cached`, read by all heads.
fn full_lists(model: &Model, cached: usize) -> HeadLists {
    let heads = model.config().num_layers * model.config().num_kv_heads;
    HeadLists {
        lists: vec![(0..cached).collect()],
        of_head: vec![0; heads],
    }
}

/// Every instruction set, through the kernels for many rows and, token by token, through those for few.
#[test]
fn every_instruction_set_gives_the_reference_logits() {
    for isa in CpuIsa::available() {
        for fixture in Fixture::all() {
            let mut model = fixture.model_on(isa);
            let tokens = fixture.ids("tokens");
            let want = fixture.floats("logits");
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            let at_once = dense(&mut model, &mut sequence, &tokens);
            assert_close(
                &format!("{} on {isa:?}", fixture.name),
                &at_once,
                &want,
                TOLERANCE,
            );
            sequence.truncate(0);
            let one_by_one: Vec<f32> = tokens
                .iter()
                .flat_map(|&token| dense(&mut model, &mut sequence, &[token]))
                .collect();
            let what = format!("{} on {isa:?}, token by token", fixture.name);
            assert_close(&what, &one_by_one, &want, TOLERANCE);
        }
    }
}

#[test]
fn logits_equal_transformers() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let logits = dense(&mut model, &mut sequence, &tokens);
        assert_close(fixture.name, &logits, &fixture.floats("logits"), TOLERANCE);
        assert_eq!(sequence.len(), tokens.len());

        let tokens = fixture.ids("long_tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let logits = dense(&mut model, &mut sequence, &tokens);
        let tail = logits.len() - TAIL * model.config().vocab_size;
        let what = format!("{}, long input", fixture.name);
        assert_close(
            &what,
            &logits[tail..],
            &fixture.floats("long_logits"),
            TOLERANCE,
        );
    }
}

#[test]
fn the_last_row_alone_equals_the_last_of_all_rows() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let last = step(
            &mut model,
            &mut sequence,
            &tokens,
            None,
            LogitRows::Last,
            &[],
        )
        .logits;
        let all = fixture.floats("logits");
        assert_close(
            fixture.name,
            &last,
            &all[all.len() - model.config().vocab_size..],
            TOLERANCE,
        );

        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let none = step(
            &mut model,
            &mut sequence,
            &tokens,
            None,
            LogitRows::None,
            &[],
        );
        assert!(
            none.logits.is_empty() && none.attention.is_none(),
            "{}",
            fixture.name
        );
    }
}

#[test]
fn attention_rows_equal_transformers() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("tokens");
        let reference = fixture.floats("attention");
        // In one pass, and as a single-token step after the rest: the shape a draft captures in.
        for prefix in [0, tokens.len() - 1] {
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            if prefix > 0 {
                dense(&mut model, &mut sequence, &tokens[..prefix]);
            }
            let layers = all_layers(&model);
            let output = step(
                &mut model,
                &mut sequence,
                &tokens[prefix..],
                None,
                LogitRows::None,
                &layers,
            );
            let rows = output.attention.expect("rows were asked for");
            assert_eq!(rows.layers, layers);
            assert_eq!(
                (rows.num_heads, rows.kv_len),
                (model.config().num_heads, tokens.len())
            );
            assert_close(fixture.name, &rows.probs, &reference, TOLERANCE);
            for row in rows.probs.chunks(rows.kv_len) {
                let sum: f64 = row.iter().map(|&p| f64::from(p)).sum();
                assert!(
                    (sum - 1.0).abs() < 1e-5,
                    "{}: a row sums to {sum}",
                    fixture.name
                );
            }
        }
    }
}

#[test]
fn a_single_captured_layer_is_the_same_as_among_all() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let layers = all_layers(&model);
        let all = step(
            &mut model,
            &mut sequence,
            &tokens,
            None,
            LogitRows::None,
            &layers,
        )
        .attention
        .expect("rows");
        for layer in layers {
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            let one = step(
                &mut model,
                &mut sequence,
                &tokens,
                None,
                LogitRows::None,
                &[layer],
            )
            .attention
            .expect("rows");
            for head in 0..model.config().num_heads {
                let (got, want) = (one.row(layer, head), all.row(layer, head));
                assert_same_bits(
                    fixture.name,
                    got.expect("captured"),
                    want.expect("captured"),
                );
            }
        }
    }
}

#[test]
fn prefill_in_chunks_equals_one_pass() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let whole = dense(&mut model, &mut sequence, &tokens);
        for sizes in [&[1][..], &[7, 1, 31, 2], &[64], &[127, 3]] {
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            let mut logits = Vec::new();
            let mut rest = &tokens[..];
            for &size in sizes.iter().cycle() {
                let (chunk, after) = rest.split_at(usize::min(size, rest.len()));
                logits.extend(dense(&mut model, &mut sequence, chunk));
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            assert_close(
                &format!("{}, chunks of {sizes:?}", fixture.name),
                &logits,
                &whole,
                SELF_TOLERANCE,
            );
        }
    }
}

/// What a confirming pass relies on: however long the run, every row has the bits of a step of its own.
#[test]
fn verified_rows_equal_single_steps_bit_for_bit() {
    const ROWS: usize = 81;
    for isa in CpuIsa::available() {
        for fixture in Fixture::all() {
            let mut model = fixture.model_on(isa);
            let tokens = fixture.ids("long_tokens");
            let (cached, run) = tokens.split_at(tokens.len() - ROWS);
            let mut sequence = model.new_sequence(tokens.len() + 1).expect("room");
            dense(&mut model, &mut sequence, cached);
            let alone: Vec<f32> = run
                .iter()
                .flat_map(|&token| dense(&mut model, &mut sequence, &[token]))
                .collect();
            sequence.truncate(cached.len());
            let rows = LogitRows::Verify;
            let together = step(&mut model, &mut sequence, run, None, rows, &[]);
            assert_same_bits(fixture.name, &together.logits, &alone);
            // Its KV entries are those of single steps as well.
            let next = dense(&mut model, &mut sequence, &tokens[..1]);
            sequence.truncate(cached.len());
            for &token in run {
                dense(&mut model, &mut sequence, &[token]);
            }
            let again = dense(&mut model, &mut sequence, &tokens[..1]);
            assert_same_bits(fixture.name, &next, &again);
        }
    }
}

#[test]
fn truncation_forgets_exactly_what_came_after() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        let whole = dense(&mut model, &mut sequence, &tokens);
        let vocab = model.config().vocab_size;
        // Other tokens are written over the cut-off part first: what is left of them must not matter.
        let wrong: Vec<u32> = tokens.iter().map(|t| (t + 17) % vocab as u32).collect();
        for keep in [299, 256, 255, 129, 64, 16, 1, 0] {
            sequence.truncate(keep);
            assert_eq!(sequence.len(), keep);
            dense(&mut model, &mut sequence, &wrong[keep..]);
            sequence.truncate(keep);
            let again = dense(&mut model, &mut sequence, &tokens[keep..]);
            let what = format!("{}, truncated to {keep}", fixture.name);
            assert_close(&what, &again, &whole[keep * vocab..], SELF_TOLERANCE);
        }
        sequence.truncate(usize::MAX);
        assert_eq!(
            sequence.len(),
            tokens.len(),
            "a longer length changes nothing"
        );
    }
}

#[test]
fn a_full_list_equals_dense_attention() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        dense(&mut model, &mut sequence, &tokens[..cached]);
        let want = step(
            &mut model,
            &mut sequence,
            &tokens[cached..],
            None,
            LogitRows::All,
            &[],
        );
        sequence.truncate(cached);
        let lists = full_lists(&model, cached);
        let got = step(
            &mut model,
            &mut sequence,
            &tokens[cached..],
            Some(&lists),
            LogitRows::All,
            &[],
        );
        assert_close(fixture.name, &got.logits, &want.logits, SELF_TOLERANCE);
        assert_eq!(got.kv, want.kv, "{}", fixture.name);
        assert_eq!(got.kv.read, got.kv.dense, "{}", fixture.name);
    }
}

#[test]
fn masked_steps_equal_transformers_with_a_mask() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        dense(&mut model, &mut sequence, &tokens[..cached]);
        for percent in DENSITIES {
            let (lists, reference) = fixture.lists(percent);
            sequence.truncate(cached);
            let output = step(
                &mut model,
                &mut sequence,
                &tokens[cached..],
                Some(&lists),
                LogitRows::All,
                &[],
            );
            let what = format!("{}, lists of {percent} %", fixture.name);
            assert_close(&what, &output.logits, &reference, TOLERANCE);

            // An entry is read once per KV head: the list, and the step's own tokens.
            let heads = lists.of_head.len() as u64;
            let listed: u64 = lists
                .of_head
                .iter()
                .map(|&l| lists.lists[l as usize].count() as u64)
                .sum();
            assert_eq!(output.kv.read, listed + heads * TAIL as u64, "{what}");
            assert_eq!(output.kv.dense, heads * tokens.len() as u64, "{what}");
        }
    }
}

/// Storing KV entries in half precision rounds them once and changes nothing else.
#[test]
fn half_precision_kv_stays_within_its_rounding() {
    for fixture in Fixture::all() {
        for dtype in [DType::F16, DType::Bf16] {
            let mut model = fixture.model_with(dtype);
            let tokens = fixture.ids("long_tokens");
            let cached = tokens.len() - TAIL;
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            dense(&mut model, &mut sequence, &tokens[..cached]);
            let logits = dense(&mut model, &mut sequence, &tokens[cached..]);
            let what = format!("{}, {dtype:?} KV", fixture.name);
            let tolerance = kv_tolerance(dtype);
            assert_close(&what, &logits, &fixture.floats("long_logits"), tolerance);
            for percent in DENSITIES {
                let (lists, reference) = fixture.lists(percent);
                sequence.truncate(cached);
                let tail = &tokens[cached..];
                let output = step(
                    &mut model,
                    &mut sequence,
                    tail,
                    Some(&lists),
                    LogitRows::All,
                    &[],
                );
                let what = format!("{what}, lists of {percent} %");
                assert_close(&what, &output.logits, &reference, tolerance);
            }
        }
    }
}

#[test]
fn rows_of_a_masked_step_lie_on_its_list() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        dense(&mut model, &mut sequence, &tokens[..cached]);
        let (lists, _) = fixture.lists(15);
        let layers = all_layers(&model);
        let tail = &tokens[cached..];
        let output = step(
            &mut model,
            &mut sequence,
            tail,
            Some(&lists),
            LogitRows::None,
            &layers,
        );
        let rows = output.attention.expect("rows were asked for");
        let (heads, kv_heads) = (model.config().num_heads, model.config().num_kv_heads);
        for &layer in &layers {
            for head in 0..heads {
                let list = &lists.lists[layer * kv_heads + head / (heads / kv_heads)];
                let row = rows.row(layer, head).expect("captured");
                for (position, &probability) in row.iter().enumerate() {
                    let read = position >= cached || list.contains(position);
                    assert!(
                        read || probability == 0.0,
                        "{}: position {position}",
                        fixture.name
                    );
                }
                let sum: f64 = row.iter().map(|&p| f64::from(p)).sum();
                assert!(
                    (sum - 1.0).abs() < 1e-5,
                    "{}: a row sums to {sum}",
                    fixture.name
                );
            }
        }
    }
}

#[test]
fn heads_may_share_a_list() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        dense(&mut model, &mut sequence, &tokens[..cached]);
        let (distinct, _) = fixture.lists(15);
        let chosen = distinct.lists[0].clone();
        let heads = distinct.of_head.len();
        let shared = HeadLists {
            lists: vec![PositionSet::default(), chosen.clone()],
            of_head: vec![1; heads],
        };
        let apart = HeadLists {
            lists: vec![chosen; heads],
            of_head: (0..heads as u32).collect(),
        };
        let mut run = |lists: &HeadLists| {
            sequence.truncate(cached);
            step(
                &mut model,
                &mut sequence,
                &tokens[cached..],
                Some(lists),
                LogitRows::All,
                &[],
            )
        };
        let (got, want) = (run(&shared), run(&apart));
        assert_same_bits(fixture.name, &got.logits, &want.logits);
        assert_eq!(got.kv, want.kv);
    }
}

#[test]
fn a_ragged_batch_equals_each_sequence_alone_bit_for_bit() {
    let dtypes = [DType::F32, DType::Bf16, DType::F16].into_iter().cycle();
    for (fixture, dtype) in Fixture::all().zip(dtypes) {
        let mut model = fixture.model_with(dtype);
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let (lists, _) = fixture.lists(15);
        let capture = all_layers(&model);
        // (tokens cached before, tokens of the step, masked, rows wanted)
        let parts = [
            (cached, TAIL, true, LogitRows::All),
            (0, 33, false, LogitRows::Last),
            (17, 1, false, LogitRows::All),
            (cached, TAIL, false, LogitRows::All),
            (100, 90, false, LogitRows::None),
            (cached, 1, true, LogitRows::Last),
        ];
        let prepare = |model: &mut Model, held: usize| {
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            if held > 0 {
                dense(model, &mut sequence, &tokens[..held]);
            }
            sequence
        };

        let mut alone = Vec::new();
        for &(held, new, masked, logits) in &parts {
            let mut sequence = prepare(&mut model, held);
            let lists = masked.then_some(&lists);
            alone.push(step(
                &mut model,
                &mut sequence,
                &tokens[held..held + new],
                lists,
                logits,
                &capture,
            ));
        }

        let mut sequences: Vec<Sequence> = parts
            .iter()
            .map(|part| prepare(&mut model, part.0))
            .collect();
        let mut steps: Vec<Step<'_>> = sequences
            .iter_mut()
            .zip(&parts)
            .map(|(sequence, &(held, new, masked, logits))| Step {
                lists: masked.then_some(&lists),
                logits,
                capture: &capture,
                ..Step::new(sequence, &tokens[held..held + new])
            })
            .collect();
        let together = model.forward(&mut steps).expect("a valid batch");
        drop(steps);

        assert_eq!(together.len(), alone.len());
        for (index, (got, want)) in together.iter().zip(&alone).enumerate() {
            let what = format!("{}, part {index}", fixture.name);
            assert_same_bits(&what, &got.logits, &want.logits);
            let (got_rows, want_rows) = (got.attention.as_ref(), want.attention.as_ref());
            assert_same_bits(
                &what,
                &got_rows.expect("rows").probs,
                &want_rows.expect("rows").probs,
            );
            assert_eq!(got.kv, want.kv, "{what}");
        }
        for (sequence, part) in sequences.iter().zip(&parts) {
            assert_eq!(sequence.len(), part.0 + part.1);
        }
    }
}
