//! Rounds without masks, drafted for whatever is likely to come.

use super::*;

fn exploring(lookahead: LookaheadMode) -> Bench {
    let drafting = Drafting {
        lookahead,
        ..spec(200).drafting
    };
    let mut bench = Bench::new(SessionSpec {
        drafting,
        ..spec(200)
    });
    bench.session.join(welcome()).unwrap();
    bench
}

/// The answer to a round ahead: all tokens.
fn all_told(base: usize, accepted: &[u32], next_token: u32, epoch: u64) -> Verdict {
    Verdict {
        next_tokens: [accepted, &[next_token]].concat(),
        ..judged(base, accepted.len(), next_token, epoch)
    }
}

impl Bench {
    fn proposals(&mut self) -> Vec<Proposal> {
        std::iter::from_fn(|| self.proposals.try_recv().ok()).collect()
    }

    /// Rounds that are accepted whole, until the draft has found out that it is always right.
    fn found_reliable(&mut self) {
        for _ in 0..30 {
            self.run();
            self.proposals();
            let n = self.session.tokens.len();
            let text = continuation(self.session.tokens.clone(), 5);
            let round = self.session.prospects.as_ref().unwrap().judged().len();
            self.judge(all_told(n, &text[..round], text[round], 0));
            if n > 100 {
                break;
            }
        }
        self.run();
    }
}

#[test]
fn a_draft_that_is_always_right_drafts_along_its_own_chain() {
    let mut bench = exploring(LookaheadMode::On);
    bench.found_reliable();
    let n = bench.session.tokens.len();
    let text = continuation(bench.session.tokens.clone(), 20);
    bench.proposals();
    // Its next rounds are there; each verdict lets it draft another.
    for turn in 0..3 {
        let at = 5 * turn;
        let cached = bench.session.cached();
        bench.judge(all_told(n + at, &text[at..at + 4], text[at + 4], 0));
        assert_eq!(bench.session.cached(), cached, "nothing is fed twice");
        let fed: Vec<usize> = bench.run().iter().map(Vec::len).collect();
        assert!(fed.iter().all(|&tokens| tokens == 1), "{fed:?}");
        let sent = bench.proposals();
        let [proposal] = &sent[..] else {
            panic!("{sent:?}");
        };
        let base = n + at + 15;
        assert_eq!((proposal.base, proposal.epoch), (base, 0));
        assert_eq!(proposal.draft.len(), 4);
        let ahead = proposal.ahead.as_ref().unwrap();
        assert_eq!(ahead.assumed.len(), 10);
        assert!(!ahead.unawaited);
    }
}

#[test]
fn another_verdict_begins_again_from_what_was_told() {
    for (accepted, next_token) in [(2, 9), (4, 9), (0, 1)] {
        let mut bench = exploring(LookaheadMode::On);
        bench.found_reliable();
        bench.proposals();
        let (n, known) = (bench.session.tokens.len(), bench.session.tokens.clone());
        let text = continuation(known.clone(), 4);
        let rejected = u64::from(accepted < 4);
        bench.judge(all_told(n, &text[..accepted], next_token, rejected));
        let told = [&known[..], &text[..accepted], &[next_token]].concat();
        assert_eq!(bench.session.tokens, told);
        bench.run();
        let first = bench.proposal();
        assert_eq!((first.base, first.epoch), (told.len(), rejected));
        assert_eq!(tokens(&first), continuation(told, 4));
        assert!(first.ahead.unwrap().assumed.is_empty());
        // A verdict on more than was proposed, of which it does not tell the tokens, makes no sense.
        let beyond = judged(n + accepted + 1, 5, 1, rejected);
        assert!(bench.session.judge(beyond).is_err());
    }
}

#[test]
fn a_greedy_draft_also_drafts_for_what_the_target_may_prefer() {
    let mut bench = exploring(LookaheadMode::On);
    bench.run();
    let text = continuation(bench.session.tokens.clone(), 5);
    let sent = bench.proposals();
    let rejected = sent.iter().filter_map(|proposal| {
        let (last, accepted) = proposal.ahead.as_ref()?.assumed.split_last()?;
        (text.starts_with(accepted) && text[accepted.len()] != *last).then_some(proposal)
    });
    let rejected: Vec<&Proposal> = rejected.collect();
    assert!(!rejected.is_empty(), "{sent:?}");
    for proposal in rejected {
        let assumed = &proposal.ahead.as_ref().unwrap().assumed;
        let epoch = u64::from(assumed.len() < 5);
        assert_eq!(proposal.epoch, epoch, "{proposal:?}");
    }
}

#[test]
fn a_target_that_does_not_wait_is_met_after_its_step() {
    let mut bench = exploring(LookaheadMode::Unawaited);
    bench.run();
    let text = continuation(vec![3, 1, 4], 20);
    // The target is taking a step; what it draws is the pending token of the round.
    let first = &bench.proposals()[0];
    assert_eq!((first.base, first.epoch), (4, 1));
    assert_eq!(first.pending_token, text[0]);
    let ahead = first.ahead.as_ref().unwrap();
    assert_eq!((&ahead.assumed[..], ahead.unawaited), (&text[..1], true));
    assert_eq!(first.draft[0].token, text[1]);
    let proposed = first.draft.len();
    bench.judge(told(3, &text[..1], 1));
    bench.run();
    assert!(bench.proposals().iter().all(|later| later.base > 4));
    bench.judge(all_told(4, &text[1..1 + proposed], text[1 + proposed], 1));
    assert_eq!(bench.session.tokens[3..], text[..2 + proposed]);
    // Where the guess failed it takes another step alone.
    let n = bench.session.tokens.len();
    bench.judge(told(n, &[9, 9], 3));
    bench.run();
    let sent = bench.proposals();
    assert_eq!((sent[0].base, sent[0].epoch), (n + 3, 4));
    // Its step was no round of which the draft would know what was accepted.
    assert!(bench.session.judge(judged(n + 2, 2, 1, 4)).is_err());
}

#[test]
fn rounds_that_were_given_up_may_come_true_all_the_same() {
    let mut bench = exploring(LookaheadMode::On);
    bench.found_reliable();
    bench.proposals();
    let n = bench.session.tokens.len();
    let text = continuation(bench.session.tokens.clone(), 20);
    // The draft goes back to waiting while the round behind the one that is judged is at the target.
    bench.session.joined.as_mut().unwrap().lookahead = Lookahead::fixed(Way::Waiting);
    bench.judge(all_told(n, &text[..4], text[4], 0));
    assert!(bench.session.prospects.is_none());
    assert_eq!(bench.session.draft.len(), 4, "its verdict is to come");
    bench.judge(all_told(n + 5, &text[5..9], text[9], 0));
    bench.run();
    let own = bench.proposal();
    assert_eq!((own.base, &own.ahead), (n + 10, &None));
    // So does the one after that, before the target hears of the draft's own.
    bench.judge(all_told(n + 10, &text[10..14], 3, 1));
    assert_eq!(bench.session.tokens[n..], [&text[..14], &[3]].concat());
    bench.run();
    assert_eq!(bench.proposal().base, n + 15);
}

#[test]
fn sampled_rounds_are_drawn_as_the_target_will_check() {
    let mut bench = exploring(LookaheadMode::Unawaited);
    let sampling = SamplingParams {
        temperature: 1.0,
        seed: 7,
        ..SamplingParams::default()
    };
    bench.session.joined.as_mut().unwrap().sampler = Sampler::new(sampling.clone(), VOCAB).unwrap();
    bench.run();
    let sent = bench.proposals();
    // The likely token first, then others: each has a round of its own.
    assert!(sent.len() > 4, "{}", sent.len());
    let rng = bench.session.joined.as_ref().unwrap().rng;
    for (index, proposal) in sent.iter().enumerate() {
        let assumed = proposal.ahead.as_ref().unwrap().assumed.iter();
        let before = [3, 1, 4].iter().chain(assumed).copied();
        let rng = rng.attempt(proposal.epoch).behind(before);
        check_draft(&proposal.draft, false, VOCAB, &rng, proposal.base as u64).unwrap();
        let assumed = |p: &Proposal| p.ahead.clone().unwrap().assumed;
        assert!(
            !sent[..index]
                .iter()
                .any(|p| assumed(p) == assumed(proposal))
        );
        assert_eq!(assumed(proposal).last(), Some(&proposal.pending_token));
    }
    // One of the others comes true: its round needs no drafting, and those behind it stay.
    let chosen = sent.iter().filter(|p| p.base == 4).nth(1).unwrap();
    bench.judge(told(3, &[chosen.pending_token], 1));
    assert_eq!(
        bench.session.prospects.as_ref().unwrap().judged(),
        chosen.draft
    );
    bench.run();
    for later in bench.proposals() {
        assert!(later.base > 4);
        assert!(later.ahead.unwrap().assumed.len() < later.base - 3);
    }
}

#[test]
fn nothing_is_drafted_beyond_the_sessions_end() {
    let drafting = Drafting {
        lookahead: LookaheadMode::On,
        ..spec(9).drafting
    };
    let mut bench = Bench::new(SessionSpec {
        drafting,
        ..spec(9)
    });
    bench.session.join(welcome()).unwrap();
    bench.run();
    for proposal in bench.proposals() {
        assert!(proposal.base + proposal.draft.len() < 9, "{proposal:?}");
    }
    assert!(bench.cache.len() <= 9);
}
