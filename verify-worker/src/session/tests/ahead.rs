//! Rounds that come for what the session may come to.

use super::*;

impl Draft {
    /// A round for the session at `epoch` with exactly these tokens, the last `assumed` of which the draft was not told.
    fn ahead(&mut self, epoch: u64, text: &[u32], assumed: usize, round: &[u32]) -> ProposalPart {
        ProposalPart {
            epoch,
            base: text.len() as u64,
            pending_token: text[text.len() - 1],
            pacing: Pacing::Unawaited,
            assumed: text[text.len() - assumed..].to_vec(),
            ..self.part(round)
        }
    }
}

fn joined() -> (Bench, Draft, Vec<u32>) {
    let mut bench = Bench::new(spec(60));
    let mut draft = bench.join(3);
    draft.welcome();
    bench.step();
    (bench, draft, continuation(&[3, 1, 4], 60))
}

#[test]
fn the_round_that_fits_is_judged_and_no_other_answered() {
    let (mut bench, mut draft, right) = joined();
    // Three guesses of what a step alone brings, then what comes after the right one's round.
    for guess in [right[3] + 1, right[3], right[3] + 2] {
        let text = [&right[..3], &[guess % VOCAB as u32]].concat();
        let part = draft.ahead(1, &text, 1, &right[4..6]);
        bench.session.receive(draft.id, part);
    }
    let part = draft.ahead(1, &right[..7], 4, &right[7..9]);
    bench.session.receive(draft.id, part);
    let readiness = |bench: &Bench| bench.session.readiness(bench.now);
    assert_eq!(readiness(&bench), Readiness::Alone);
    bench.step();
    assert_eq!(bench.session.tokens, right[..4]);
    assert_eq!(readiness(&bench), Readiness::Ready);
    for (tokens, accepted) in [(7, 2), (10, 2)] {
        bench.step();
        assert_eq!(bench.session.tokens, right[..tokens]);
        let verdict = std::iter::repeat_with(|| draft.verdict()).find(|verdict| verdict.judged);
        assert_eq!(verdict.unwrap().accepted, accepted);
    }
    assert!(draft.events.try_recv().is_err());
    assert_eq!(bench.session.stats.stale_proposals, 0);
    assert_eq!(bench.session.stats.solo_forwards, 1);
}

#[test]
fn a_round_for_another_text_of_the_same_length_and_end_is_not_judged() {
    let (mut bench, mut draft, right) = joined();
    let mut other = right[..5].to_vec();
    other[3] += 1;
    let part = draft.ahead(2, &other, 2, &right[5..7]);
    bench.session.receive(draft.id, part);
    while bench.session.tokens.len() < 8 {
        if bench.step().is_none() {
            bench.now += TIMEOUT;
        }
    }
    assert_eq!(bench.session.stats.proposed_tokens, 0);
    assert_eq!(bench.session.tokens, right[..8]);
}

#[test]
fn no_time_is_lost_on_a_draft_that_asks_for_no_waiting() {
    let (mut bench, mut draft, right) = joined();
    let part = draft.ahead(9, &right[..40], 1, &right[40..42]);
    bench.session.receive(draft.id, part);
    bench.session.forward = Duration::from_millis(8);
    let start = bench.now;
    while bench.session.tokens.len() < 35 {
        bench.session.forward = Duration::from_millis(8);
        if bench.step().is_none() {
            bench.now += Duration::from_millis(1);
        }
    }
    // A millisecond for the first eight steps and every eighth.
    assert!(bench.now - start <= Duration::from_millis(12));
    assert!(bench.now - start >= Duration::from_millis(8));
    assert!(bench.session.link.is_some());
}

#[test]
fn modes_with_masks_take_rounds_in_order_only() {
    let mut bench = Bench::new(SessionSpec {
        mode: Mode::Sparse,
        ..spec(60)
    });
    let mut draft = bench.join(3);
    draft.welcome();
    let part = draft.ahead(1, &[3, 1, 4, 1], 1, &[5, 6]);
    bench.session.receive(draft.id, part);
    assert!(bench.session.link.is_none());
}
