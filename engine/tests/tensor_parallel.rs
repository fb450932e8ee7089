//! Models split over ranks against the same models whole.
//!
//! Tolerance: a split changes the order of the sums after attention and MLP and nothing else, in f32, so it moves logits by as much as
//! another order of the same products does: [`TOLERANCE`], the bound that golden.rs has against transformers. A head, a
//! column or a bias in the wrong place moves them by more than 1e-2.

mod fixture;

use std::path::Path;

use fixture::{DENSITIES, Fixture, TAIL};
use serde::Deserialize;
use specattn_engine::{
    EngineError, HeadLists, LoadOptions, LogitRows, MixedHead, MixedRow, Model, Round,
    RowSelection, Step, StepOutput,
};

/// Absolute, and relative to the whole model's value.
const TOLERANCE: f32 = 1e-4;

/// A logit gap at which sums taken in a different order may choose either token.
const TIE: f32 = 1e-4;

/// Checkpoints of the fixtures whose sizes divide by 2.
const EVEN: [&str; 4] = ["llama3", "llama_bias", "mistral", "qwen2"];

/// Shapes that divide by 4: what a split must not get wrong in families whose fixtures have one KV head.
const SHAPES: [(&str, &str); 3] = [
    (
        "llama with biases",
        r#""model_type": "llama", "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false"#,
    ),
    (
        "qwen3, tied",
        r#""model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": true"#,
    ),
    (
        "qwen2",
        r#""model_type": "qwen2", "tie_word_embeddings": false"#,
    ),
];

fn assert_close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let allowed = TOLERANCE * (1.0 + w.abs());
        // Written so that NaN fails.
        assert!(
            (g - w).abs() <= allowed,
            "{what}: value {i} is {g}, whole {w}"
        );
    }
}

/// One output against the whole model's.
fn assert_joined(what: &str, got: &StepOutput, want: &StepOutput) {
    assert_close(&format!("{what}, logits"), &got.logits, &want.logits);
    assert_eq!(got.argmax, want.argmax, "{what}");
    assert_eq!(got.kv, want.kv, "{what}");
    assert_eq!(got.attention.is_some(), want.attention.is_some(), "{what}");
    if let (Some(got), Some(want)) = (&got.attention, &want.attention) {
        assert_eq!((&got.layers, got.num_heads), (&want.layers, want.num_heads));
        assert_close(&format!("{what}, rows"), &got.probs, &want.probs);
    }
    assert_eq!(got.masses.is_some(), want.masses.is_some(), "{what}");
    if let (Some(got), Some(want)) = (&got.masses, &want.masses) {
        assert_eq!(got.of_head.len(), want.of_head.len(), "{what}");
        for (got, want) in got.of_head.iter().zip(&want.of_head) {
            assert_close(&format!("{what}, masses"), got, want);
        }
    }
}

/// A prompt in one bulk pass, then a batch of two sequences that asks for everything, with lists where there are any.
fn outputs(model: &mut Model, prompt: &[u32], lists: Option<&HeadLists>) -> Vec<StepOutput> {
    let layers: Vec<usize> = (0..model.config().num_layers).rev().collect();
    let (body, tail) = prompt.split_at(prompt.len() - TAIL);
    let mut long = model.new_sequence(prompt.len()).expect("room");
    let mut short = model.new_sequence(64).expect("room");
    let mut outputs = model
        .forward(&mut [Step {
            logits: LogitRows::Last,
            ..Step::new(&mut long, body)
        }])
        .expect("a bulk step");
    let steps = [
        Step {
            lists,
            logits: LogitRows::All,
            capture: &layers,
            masses: true,
            ..Step::new(&mut long, tail)
        },
        Step {
            logits: LogitRows::All,
            argmax: true,
            ..Step::new(&mut short, &tail[..3])
        },
    ];
    outputs.extend(model.forward(&mut { steps }).expect("valid steps"));
    assert_eq!((long.len(), short.len()), (prompt.len(), 3));
    outputs
}

fn compare(what: &str, split: &mut Model, whole: &mut Model, prompt: &[u32], lists: &[HeadLists]) {
    let cases = std::iter::once(None).chain(lists.iter().map(Some));
    for (index, lists) in cases.enumerate() {
        let got = outputs(split, prompt, lists);
        let want = outputs(whole, prompt, lists);
        for (number, (got, want)) in got.iter().zip(&want).enumerate() {
            let what = format!("{what}, lists {index}, output {number}");
            assert_joined(&what, got, want);
        }
    }
}

#[test]
fn checkpoints_split_in_two_give_what_they_give_whole() {
    for fixture in EVEN.map(Fixture::open) {
        let (mut split, mut whole) = (fixture.model_split(2), fixture.model());
        assert_eq!((split.devices().len(), whole.devices().len()), (2, 1));
        assert!(split.kv_blocks().1 >= whole.kv_blocks().1 - 1);
        let prompt = fixture.ids("long_tokens");
        let lists = DENSITIES.map(|percent| fixture.lists(percent).0);
        compare(fixture.name, &mut split, &mut whole, &prompt, &lists);
    }
}

/// Lists that differ from head to head, some of them shared.
fn some_lists(model: &Model, cached: usize) -> HeadLists {
    let heads = model.config().num_layers * model.config().num_kv_heads;
    let list = |n: usize| {
        (0..cached)
            .filter(|p| (p * 7 + n).is_multiple_of(n + 2))
            .collect()
    };
    HeadLists {
        lists: (0..heads).map(list).collect(),
        of_head: (0..heads as u32)
            .map(|head| head * 5 % 7 % heads as u32)
            .collect(),
    }
}

#[test]
fn shapes_split_in_two_and_four_give_what_they_give_whole() {
    let folder = tempfile::tempdir().expect("a folder");
    let prompt: Vec<u32> = (0..80).map(|i| i * 37 % 96).collect();
    for (name, family) in SHAPES {
        let config = folder.path().join("config.json");
        let sizes = r#""vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256"#;
        std::fs::write(&config, format!("{{ {sizes}, {family} }}")).expect("a file");
        let load = |ranks| {
            let options = LoadOptions {
                kv_cache_bytes: 4 << 20,
                threads: 2,
                tensor_parallel: Some(ranks),
                ..LoadOptions::default()
            };
            Model::random(&config, &options).expect("a shape that divides")
        };
        let mut whole = load(1);
        let lists = some_lists(&whole, prompt.len() - TAIL);
        for ranks in [2, 4] {
            let what = format!("{name} over {ranks}");
            let lists = std::slice::from_ref(&lists);
            compare(&what, &mut load(ranks), &mut whole, &prompt, lists);
        }
    }
}

#[test]
fn results_do_not_depend_on_what_else_is_in_the_batch() {
    let mut model = Fixture::open("llama3").model_split(2);
    let run = |model: &mut Model, others: usize| -> Vec<u32> {
        let mut sequences: Vec<_> = (0..=others)
            .map(|_| model.new_sequence(64).expect("room"))
            .collect();
        let tokens: Vec<Vec<u32>> = (0..=others as u32)
            .map(|n| vec![n + 1; 5 + n as usize])
            .collect();
        let steps = sequences
            .iter_mut()
            .zip(&tokens)
            .map(|(sequence, tokens)| Step {
                logits: LogitRows::All,
                ..Step::new(sequence, tokens)
            });
        let outputs = model
            .forward(&mut steps.collect::<Vec<_>>())
            .expect("steps");
        outputs[0].logits.iter().map(|x| x.to_bits()).collect()
    };
    let alone = run(&mut model, 0);
    for others in 1..4 {
        assert!(run(&mut model, others) == alone, "beside {others}");
    }
}

#[test]
fn a_split_model_hands_out_rows_where_a_selection_is_asked_for() {
    let mut model = Fixture::open("llama3").model_split(2);
    let mut sequence = model.new_sequence(64).expect("room");
    let selection = RowSelection {
        rows: vec![MixedRow {
            terms: vec![MixedHead {
                layer: 0,
                head: 5,
                weight: 1.0,
            }],
            p: 0.9,
            spread: None,
        }],
        round: Round::default(),
    };
    let step = Step {
        capture: &[0],
        select: Some(&selection),
        ..Step::new(&mut sequence, &[1, 2, 3])
    };
    let output = model.forward(&mut [step]).expect("a step").remove(0);
    assert!(output.selected.is_none());
    assert_eq!(output.attention.expect("rows").num_heads, 6);
}

#[test]
fn what_does_not_divide_is_refused_by_name() {
    for (name, ranks, size) in [
        ("llama2", 2, "KV heads of llama2: 3"),
        ("llama2", 3, "intermediate size of llama2: 88"),
        ("qwen3", 2, "KV heads of qwen3: 1"),
        ("llama3", 0, "does not divide by 0"),
    ] {
        let options = LoadOptions {
            kv_cache_bytes: 1 << 20,
            tensor_parallel: Some(ranks),
            ..LoadOptions::default()
        };
        let folder = Fixture::open(name).folder;
        let error = Model::load(&folder, &options, &mut |_, _| {}).expect_err("no even split");
        assert!(
            matches!(error, EngineError::InvalidArgument { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(size), "{error}");
    }
}

#[derive(Deserialize)]
struct Reference {
    prompts: Vec<Continuation>,
}

/// See `tests/python/greedy_reference.py`.
#[derive(Deserialize)]
struct Continuation {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
    gaps: Vec<f32>,
}

/// Rounding rule: a token may differ only where the reference's two largest logits are closer than [`TIE`].
#[test]
fn greedy_tokens_of_the_bundled_target_split_in_two_equal_transformers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("tests/fixtures/greedy_bundled.json"));
    let reference: Reference =
        serde_json::from_str(&text.expect("part of the tree")).expect("the fixture's form");
    let options = LoadOptions {
        kv_cache_bytes: 256 << 20,
        tensor_parallel: Some(2),
        ..LoadOptions::default()
    };
    let mut model = Model::load(&root.join("models/target"), &options, &mut |_, _| {})
        .expect("the bundled target");
    // Shorter prompts first: long ones say little more about the split.
    let mut prompts: Vec<&Continuation> = reference.prompts.iter().collect();
    prompts.sort_by_key(|entry| entry.prompt.len());
    for entry in &prompts[..12] {
        let mut sequence = model
            .new_sequence(entry.prompt.len() + entry.greedy.len())
            .expect("room");
        let mut next = entry.prompt.clone();
        for (at, &want) in entry.greedy.iter().enumerate() {
            let step = Step {
                logits: LogitRows::Last,
                argmax: true,
                ..Step::new(&mut sequence, &next)
            };
            let token = model.forward(&mut [step]).expect("a step").remove(0).argmax[0];
            if token != Some(want) {
                let (prompt, gap) = (entry.prompt.len(), entry.gaps[at]);
                assert!(gap < TIE, "prompt of {prompt}: token {at}, gap {gap}");
                break;
            }
            next = vec![want];
        }
    }
}
