//! What a caller may get wrong in a step, and what the KV budget allows: a clear error, and nothing has changed.

mod fixture;

use fixture::Fixture;
use specattn_engine::{EngineError, HeadLists, LoadOptions, LogitRows, Model, Sequence, Step};

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| i * 7 % 96).collect()
}

fn plain<'a>(sequence: &'a mut Sequence, tokens: &'a [u32]) -> Step<'a> {
    Step {
        logits: LogitRows::Last,
        ..Step::new(sequence, tokens)
    }
}

/// Lists for every head of `model`, all reading the first.
fn lists(model: &Model, lists: &[&[usize]]) -> HeadLists {
    let heads = model.config().num_layers * model.config().num_kv_heads;
    HeadLists {
        lists: lists
            .iter()
            .map(|list| list.iter().copied().collect())
            .collect(),
        of_head: vec![0; heads],
    }
}

/// Runs a good step and then a bad one in one batch: the bad one must fail it and neither sequence may grow.
fn refused(
    model: &mut Model,
    held: usize,
    tokens_: &[u32],
    lists: Option<&HeadLists>,
    capture: &[usize],
) -> EngineError {
    let mut good = model.new_sequence(64).expect("room");
    let mut bad = model.new_sequence(64).expect("room");
    let prefix = tokens(held);
    if held > 0 {
        model
            .forward(&mut [plain(&mut bad, &prefix)])
            .expect("a valid step");
    }
    let some = tokens(3);
    let steps = &mut [
        plain(&mut good, &some),
        Step {
            lists,
            logits: LogitRows::All,
            capture,
            ..Step::new(&mut bad, tokens_)
        },
    ];
    let error = model
        .forward(steps)
        .expect_err("a bad step must be refused");
    assert_eq!((good.len(), bad.len()), (0, held), "{error}");
    error
}

#[test]
fn bad_steps_are_refused_and_change_nothing() {
    let mut model = Fixture::open("qwen3").model();
    let invalid = |error: EngineError, what: &str| {
        assert!(
            matches!(error, EngineError::InvalidArgument { .. }),
            "{what}: {error}"
        );
        assert!(!error.to_string().is_empty());
    };

    let error = refused(&mut model, 0, &[1, 96], None, &[]);
    assert!(
        matches!(
            error,
            EngineError::InvalidToken {
                token: 96,
                vocab_size: 96
            }
        ),
        "{error}"
    );
    let error = refused(&mut model, 0, &[u32::MAX], None, &[]);
    assert!(matches!(error, EngineError::InvalidToken { .. }), "{error}");
    invalid(refused(&mut model, 0, &[], None, &[]), "no tokens");
    invalid(refused(&mut model, 5, &[1], None, &[2]), "no such layer");
    invalid(
        refused(&mut model, 5, &[1], None, &[usize::MAX]),
        "no such layer",
    );

    for bad in [&[5][..], &[0, 4_000_000], &[0, 1, 2, 3, 4, 5]] {
        let list = lists(&model, &[bad]);
        invalid(
            refused(&mut model, 5, &[1], Some(&list), &[]),
            &format!("list {bad:?}"),
        );
    }
    // Also when the bad list belongs to the last head alone.
    let mut list = lists(&model, &[&[0, 1], &[7]]);
    *list.of_head.last_mut().expect("heads") = 1;
    invalid(
        refused(&mut model, 5, &[1], Some(&list), &[]),
        "last head's list",
    );

    let mut list = lists(&model, &[&[0]]);
    list.of_head.pop();
    invalid(
        refused(&mut model, 5, &[1], Some(&list), &[]),
        "a head without a list",
    );
    let mut list = lists(&model, &[&[0]]);
    list.of_head.push(0);
    invalid(
        refused(&mut model, 5, &[1], Some(&list), &[]),
        "a list without a head",
    );
    let mut list = lists(&model, &[&[0]]);
    list.of_head[0] = 1;
    invalid(
        refused(&mut model, 5, &[1], Some(&list), &[]),
        "no such list",
    );
    let mut list = lists(&model, &[&[0]]);
    list.of_head[1] = u32::MAX;
    invalid(
        refused(&mut model, 5, &[1], Some(&list), &[]),
        "no such list",
    );
}

#[test]
fn a_sequence_does_not_grow_past_its_reservation() {
    let mut model = Fixture::open("llama2").model();
    let mut sequence = model.new_sequence(512).expect("room");
    let all = tokens(512);
    model
        .forward(&mut [plain(&mut sequence, &all)])
        .expect("the whole context");
    let error = model
        .forward(&mut [plain(&mut sequence, &[1])])
        .expect_err("the context is full");
    assert!(
        matches!(
            error,
            EngineError::ContextTooLong { .. } | EngineError::KvExhausted { .. }
        ),
        "{error}"
    );
    assert_eq!(sequence.len(), 512);

    let error = model.new_sequence(513).expect_err("more than the context");
    assert!(
        matches!(error, EngineError::ContextTooLong { len: 513, max: 512 }),
        "{error}"
    );
    assert!(model.new_sequence(usize::MAX).is_err());
}

#[test]
fn blocks_are_reserved_at_once_and_come_back_on_drop() {
    let fixture = Fixture::open("llama2");
    // 2 layers, 3 KV heads of 16, K and V: at most 768 bytes a position, so a budget of some 1,300 positions or more.
    let options = LoadOptions {
        kv_cache_bytes: 1 << 20,
        threads: 1,
        ..LoadOptions::default()
    };
    let model = Model::load(&fixture.folder, &options, &mut |_, _| {}).expect("a valid checkpoint");
    let (used, total) = model.kv_blocks();
    assert_eq!(used, 0);
    assert!(total > 0);

    let mut held = Vec::new();
    let error = loop {
        match model.new_sequence(512) {
            Ok(sequence) => held.push(sequence),
            Err(error) => break error,
        }
        assert!(held.len() < 100, "the budget has no effect");
    };
    assert!(matches!(error, EngineError::KvExhausted { .. }), "{error}");
    assert!(!held.is_empty());
    let (full, _) = model.kv_blocks();
    assert_eq!(full % held.len(), 0);
    assert!(full <= total && full + full / held.len() > total);

    held.pop();
    let sequence = model.new_sequence(512).expect("the blocks came back");
    drop(sequence);
    held.clear();
    assert_eq!(model.kv_blocks(), (0, total));
}

#[test]
fn truncation_keeps_the_reservation() {
    let mut model = Fixture::open("llama2").model();
    let mut sequence = model.new_sequence(300).expect("room");
    let before = model.kv_blocks();
    model
        .forward(&mut [plain(&mut sequence, &tokens(300))])
        .expect("room");
    sequence.truncate(10);
    assert_eq!(model.kv_blocks(), before);
    model
        .forward(&mut [plain(&mut sequence, &tokens(290))])
        .expect("what was reserved stays reserved");
}

#[test]
fn progress_ends_at_all_bytes() {
    let fixture = Fixture::open("llama_linear");
    let options = LoadOptions {
        kv_cache_bytes: 1 << 20,
        threads: 1,
        ..LoadOptions::default()
    };
    let mut heard = Vec::new();
    Model::load(&fixture.folder, &options, &mut |done, all| {
        heard.push((done, all))
    })
    .expect("a valid checkpoint");
    assert!(
        heard
            .windows(2)
            .all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 == pair[1].1),
        "{heard:?}"
    );
    let (done, all) = *heard.last().expect("progress was reported");
    assert!(all > 0 && done == all, "{heard:?}");
}
