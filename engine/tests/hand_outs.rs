//! What steps hand out in place of logits and rows, and models with random weights.

mod fixture;

use fixture::Fixture;
use specattn_engine::{
    EngineError, LoadOptions, LogitRows, MixedHead, MixedRow, Model, Round, RowSelection, Spread,
    Step,
};

const TOKENS: [u32; 6] = [5, 3, 90, 17, 17, 2];

#[test]
fn the_most_probable_tokens_are_those_of_the_logits() {
    let mut model = Fixture::open("llama3").model();
    let vocab = model.config().vocab_size;
    let mut run = |argmax: [bool; 2]| {
        let mut first = model.new_sequence(64).expect("room");
        let mut second = model.new_sequence(64).expect("room");
        let steps = [
            Step {
                logits: LogitRows::All,
                argmax: argmax[0],
                ..Step::new(&mut first, &TOKENS)
            },
            Step {
                logits: LogitRows::Last,
                argmax: argmax[1],
                ..Step::new(&mut second, &TOKENS[..2])
            },
        ];
        model.forward(&mut { steps }).expect("valid steps")
    };
    let logits = run([false, false]);
    // One of a batch may ask for tokens and another for logits.
    for argmax in [[true, true], [true, false], [false, true]] {
        for ((output, rows), argmax) in run(argmax).iter().zip(&logits).zip(argmax) {
            if !argmax {
                assert_eq!((&output.logits, output.argmax.len()), (&rows.logits, 0));
                continue;
            }
            assert!(output.logits.is_empty());
            let best = rows.logits.chunks_exact(vocab).map(|row| {
                let order = |a: &usize, b: &usize| row[*a].total_cmp(&row[*b]);
                (0..vocab).rev().max_by(order).map(|token| token as u32)
            });
            assert!(output.argmax.iter().copied().eq(best));
        }
    }
}

#[test]
fn a_device_that_selects_nothing_hands_out_rows() {
    let mut model = Fixture::open("llama3").model();
    let mut sequence = model.new_sequence(64).expect("room");
    let selection = |head| RowSelection {
        rows: vec![MixedRow {
            terms: vec![MixedHead {
                layer: 0,
                head,
                weight: 1.0,
            }],
            p: 0.9,
            spread: None,
        }],
        round: Round::default(),
    };
    let sound = selection(0);
    let step = Step {
        capture: &[0],
        select: Some(&sound),
        ..Step::new(&mut sequence, &TOKENS)
    };
    let output = model.forward(&mut [step]).expect("a valid step").remove(0);
    assert!(output.selected.is_none());
    assert_eq!(output.attention.expect("rows").kv_len, TOKENS.len());
    // Whichever device: heads that do not exist, and rows of nothing.
    let empty = RowSelection {
        rows: vec![MixedRow {
            terms: Vec::new(),
            p: 0.9,
            spread: None,
        }],
        round: Round::default(),
    };
    let mut too_wide = selection(0);
    too_wide.rows[0].spread = Some(Spread {
        share: 0.5,
        reach: 17,
    });
    let mut beyond_the_text = selection(0);
    beyond_the_text.round.context_len = 64;
    let none = RowSelection::default();
    for bad in [selection(1_000), empty, none, too_wide, beyond_the_text] {
        let step = Step {
            select: Some(&bad),
            ..Step::new(&mut sequence, &TOKENS)
        };
        let error = model.forward(&mut [step]).expect_err("a bad selection");
        assert!(
            matches!(error, EngineError::InvalidArgument { .. }),
            "{error}"
        );
    }
}

#[test]
fn random_weights_have_the_shape_and_are_the_same_each_time() {
    let config = Fixture::open("llama3").folder.join("config.json");
    let options = LoadOptions {
        kv_cache_bytes: 1 << 20,
        threads: 1,
        ..LoadOptions::default()
    };
    let logits = || {
        let mut model = Model::random(&config, &options).expect("a shape");
        let mut sequence = model.new_sequence(64).expect("room");
        let step = Step {
            logits: LogitRows::Last,
            ..Step::new(&mut sequence, &TOKENS)
        };
        let logits = model.forward(&mut [step]).expect("a step").remove(0).logits;
        (
            model.config().vocab_size,
            model.config().name.clone(),
            logits,
        )
    };
    let (vocab, name, first) = logits();
    assert_eq!((first.len(), name.as_str()), (vocab, "config-random"));
    assert!(first.iter().all(|x| x.is_finite()));
    assert!(first.iter().any(|&x| x.abs() > 1e-3));
    assert_eq!(logits().2, first);
}
