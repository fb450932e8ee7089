//! Rounds with masks, drafted along a guess of the verdict before.

use super::*;

fn ahead() -> Bench {
    let drafting = Drafting {
        lookahead: LookaheadMode::On,
        ..spec(100).drafting
    };
    let mut bench = Bench::new(SessionSpec {
        drafting,
        ..spec(100)
    });
    bench
        .session
        .join(Welcome {
            sources: vec![Source::layer_mean(1, HEADS as u32)],
            ..welcome()
        })
        .unwrap();
    bench
}

#[test]
fn rounds_go_out_along_the_drafts_own_chain() {
    let mut bench = ahead();
    let fed: Vec<usize> = bench.run().iter().map(Vec::len).collect();
    // The prompt; then one token a step, the guessed ones too.
    assert_eq!(fed, [vec![2], vec![1; 14]].concat());
    let text = continuation(vec![3, 1, 4], 14);
    for round in 0..3 {
        let proposal = bench.proposal();
        let at = 5 * round;
        assert_eq!(proposal.base, 3 + at);
        assert_eq!(tokens(&proposal), text[at..at + 4]);
    }
    assert!(bench.proposals.try_recv().is_err());
    assert_eq!(bench.session.plan(), Plan::Wait(None));
}

#[test]
fn a_verdict_that_was_guessed_costs_no_wait() {
    let mut bench = ahead();
    bench.run();
    let text = continuation(vec![3, 1, 4], 20);
    let sequence = (0..3).map(|_| bench.proposal().sequence).last().unwrap();
    let cached = bench.session.cached();
    bench.judge(judged(3, 4, text[4], 0));
    assert_eq!(bench.session.cached(), cached);
    // Room for another round, and nothing is fed twice.
    let fed: Vec<usize> = bench.run().iter().map(Vec::len).collect();
    assert_eq!(fed, [1; 5]);
    let proposal = bench.proposal();
    assert_eq!((proposal.base, proposal.sequence), (18, sequence + 1));
    assert_eq!(tokens(&proposal), text[15..19]);
}

#[test]
fn any_other_verdict_discards_what_was_drafted_on_it() {
    for (accepted, next_token) in [(2, 9), (4, 9), (0, 1)] {
        let mut bench = ahead();
        bench.run();
        let text = continuation(vec![3, 1, 4], 20);
        (0..3).for_each(|_| drop(bench.proposal()));
        let rejected = accepted < 4;
        bench.judge(judged(3, accepted, next_token, u64::from(rejected)));
        let known = [&[3, 1, 4], &text[..accepted], &[next_token]].concat();
        assert_eq!(bench.session.tokens, known);
        // The answers to the rounds that are stale now say nothing new.
        bench.run();
        let first = bench.proposal();
        assert_eq!(first.base, known.len());
        assert_eq!(tokens(&first), continuation(known.clone(), 4));
        for _ in 0..2 {
            bench.judge(Verdict {
                judged: false,
                next_tokens: Vec::new(),
                ..judged(known.len(), 0, 0, u64::from(rejected))
            });
        }
        assert_eq!(bench.proposal().base, known.len() + 5);
        // The next answer is to the round that is out.
        bench.judge(judged(known.len(), 1, 7, 1 + u64::from(rejected)));
        assert_eq!(bench.session.tokens.len(), known.len() + 2);
    }
}

#[test]
fn progress_that_the_target_made_alone_discards_guesses() {
    let mut bench = ahead();
    bench.run();
    let text = continuation(vec![3, 1, 4], 20);
    (0..3).for_each(|_| drop(bench.proposal()));
    bench.judge(Verdict {
        judged: false,
        next_tokens: text[..2].to_vec(),
        ..judged(3, 0, 0, 1)
    });
    // What it says is what was drafted: the entries stand.
    assert_eq!((bench.session.tokens.len(), bench.session.cached()), (5, 4));
    bench.run();
    assert_eq!(bench.proposal().base, 5);
    // A verdict on a round that was given up makes no sense.
    assert!(bench.session.judge(judged(3, 4, text[4], 1)).is_err());
}
