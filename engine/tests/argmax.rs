//! Most probable tokens in place of logits, with and without a bias.

mod fixture;

use fixture::Fixture;
use specattn_engine::{LogitRows, Step};

/// The first of the largest of a row after adding `bias`.
fn most_probable(row: &[f32], bias: &[(u32, f32)]) -> u32 {
    let mut row = row.to_vec();
    for &(token, value) in bias {
        row[token as usize] += value;
    }
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&x| x == largest).expect("a row") as u32
}

#[test]
fn tokens_are_those_of_the_biased_logits_and_other_steps_keep_theirs() {
    for fixture in Fixture::all() {
        let mut model = fixture.model();
        let vocab = model.config().vocab_size;
        let tokens = &fixture.ids("long_tokens")[..9];
        let mut sequences = [(); 3].map(|()| model.new_sequence(tokens.len()).expect("room"));
        let [plain, biased, rows] = &mut sequences;
        // One token that wins everywhere but for the first, which is only nudged.
        let bias = [(3, 0.5), (vocab as u32 - 1, 20.0)];
        let steps = &mut [
            Step {
                logits: LogitRows::All,
                argmax: true,
                ..Step::new(plain, tokens)
            },
            Step {
                logits: LogitRows::All,
                argmax: true,
                bias: &bias,
                ..Step::new(biased, tokens)
            },
            Step {
                logits: LogitRows::All,
                bias: &bias,
                ..Step::new(rows, tokens)
            },
        ];
        let outputs = model.forward(steps).expect("a forward");
        let logits: Vec<&[f32]> = outputs[2].logits.chunks_exact(vocab).collect();
        assert_eq!(logits.len(), tokens.len());
        for (row, logits) in logits.into_iter().enumerate() {
            let of = |output: usize| outputs[output].argmax[row].expect("a finite row");
            assert_eq!(of(0), most_probable(logits, &[]), "{}", fixture.name);
            assert_eq!(of(1), most_probable(logits, &bias), "{}", fixture.name);
        }
    }
}
