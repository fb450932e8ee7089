//! Masses of entries: what a step says its entries weighed is the mean of the rows that single steps capture.

mod fixture;

use fixture::{Fixture, TAIL};
use specattn_engine::{EntryMasses, HeadLists, LogitRows, Model, Sequence, Step, StepOutput};

fn step(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    lists: Option<&HeadLists>,
    masses: bool,
) -> StepOutput {
    let layers: Vec<usize> = (0..model.config().num_layers).collect();
    let mut outputs = model
        .forward(&mut [Step {
            lists,
            logits: LogitRows::All,
            capture: &layers,
            masses,
            ..Step::new(sequence, tokens)
        }])
        .expect("a valid step");
    outputs.remove(0)
}

/// Masses by definition: token by token, rows captured, each token's own predecessors added to its lists.
fn by_rows(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    lists: &HeadLists,
) -> EntryMasses {
    let cached = sequence.len();
    let (layers, heads, kv_heads) = {
        let c = model.config();
        (c.num_layers, c.num_heads, c.num_kv_heads)
    };
    let group = heads / kv_heads;
    let mut sums: Vec<Vec<f64>> = lists
        .of_head
        .iter()
        .map(|&list| vec![0.0; lists.lists[list as usize].count()])
        .collect();
    for (index, token) in tokens.iter().enumerate() {
        let mut lists = lists.clone();
        for list in &mut lists.lists {
            list.resize(cached + index);
            list.insert_range(cached, cached + index);
        }
        let output = step(model, sequence, &[*token], Some(&lists), false);
        let rows = output.attention.expect("rows were asked for");
        for layer in 0..layers {
            for head in 0..heads {
                let kv_head = layer * kv_heads + head / group;
                let list = &lists.lists[lists.of_head[kv_head] as usize];
                let row = rows.row(layer, head).expect("captured");
                for (sum, position) in sums[kv_head].iter_mut().zip(list) {
                    *sum += f64::from(row[position]);
                }
            }
        }
    }
    sequence.truncate(cached);
    let rows = (tokens.len() * group) as f64;
    let of_head = sums
        .iter()
        .map(|sums| sums.iter().map(|sum| (sum / rows) as f32).collect())
        .collect();
    EntryMasses { of_head }
}

fn assert_close(name: &str, got: &EntryMasses, want: &EntryMasses) {
    assert_eq!(got.of_head.len(), want.of_head.len(), "{name}");
    for (head, (got, want)) in got.of_head.iter().zip(&want.of_head).enumerate() {
        assert_eq!(got.len(), want.len(), "{name}: head {head}");
        for (got, want) in got.iter().zip(want) {
            assert!(
                (got - want).abs() < 1e-5,
                "{name}, head {head}: {got} {want}"
            );
        }
    }
}

#[test]
fn masses_are_the_means_of_captured_rows() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let mut sequence = model.new_sequence(tokens.len()).expect("room");
        step(&mut model, &mut sequence, &tokens[..cached], None, false);
        let (lists, _) = fixture.lists(15);
        let want = by_rows(&mut model, &mut sequence, &tokens[cached..], &lists);
        let got = step(
            &mut model,
            &mut sequence,
            &tokens[cached..],
            Some(&lists),
            true,
        );
        assert_close(fixture.name, &got.masses.expect("asked for"), &want);

        // Dense: every cached position, in order.
        sequence.truncate(cached);
        let all = HeadLists {
            lists: vec![(0..cached).collect()],
            of_head: vec![0; lists.of_head.len()],
        };
        let want = by_rows(&mut model, &mut sequence, &tokens[cached..], &all);
        let got = step(&mut model, &mut sequence, &tokens[cached..], None, true);
        assert_close(fixture.name, &got.masses.expect("asked for"), &want);
    }
}

#[test]
fn asking_for_masses_changes_no_bit() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let tokens = fixture.ids("long_tokens");
        let cached = tokens.len() - TAIL;
        let (lists, _) = fixture.lists(15);
        let mut run = |masses| {
            let mut sequence = model.new_sequence(tokens.len()).expect("room");
            step(&mut model, &mut sequence, &tokens[..cached], None, false);
            let tail = &tokens[cached..];
            step(&mut model, &mut sequence, tail, Some(&lists), masses).logits
        };
        let (with, without) = (run(true), run(false));
        assert!(
            with.iter()
                .zip(without.iter())
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }
}
