use specattn_engine::sampling::SparseDistribution;

use super::*;
use crate::acceptance::doubt;

const ROOM: usize = 16;

fn room(_: usize) -> usize {
    ROOM
}

fn odds(explorers: usize) -> Odds {
    Odds {
        acceptance: Acceptance::default(),
        explorers,
        most_tokens: 1_000,
    }
}

/// A token that was drawn with probability one half.
fn drawn(token: u32) -> DraftToken {
    let q = SparseDistribution {
        ids: vec![token, token + 1],
        probs: vec![0.5, 0.5],
    };
    DraftToken { token, q: Some(q) }
}

/// Shows the draft that these may follow.
fn look(prospects: &mut Prospects, guesses: &[(u32, f64)]) {
    let guesses = guesses.iter();
    prospects.look(guesses.map(|&(token, chance)| Guess::only(token, chance)));
}

/// Drafts on until nothing is worth it: the tails and the lengths of the rounds that were sent.
fn explore(prospects: &mut Prospects, odds: Odds) -> Vec<(Vec<u32>, usize)> {
    let mut sent = Vec::new();
    while prospects.choose(odds, &room) {
        look(prospects, &[(10, 0.5), (20, 0.2), (30, 0.001)]);
        if prospects.drafts()
            && let Some((tail, round)) = prospects.draw(drawn(10), Some(0.5))
        {
            sent.push((tail.to_vec(), round.len()));
        }
    }
    sent
}

#[test]
fn what_is_more_likely_to_come_is_drafted_earlier_and_longer() {
    let mut prospects = Prospects::new(0, ROOM, true);
    let sent = explore(&mut prospects, odds(1));
    assert_eq!((&sent[0].0, &sent[1].0), (&vec![10], &vec![20]));
    assert!(sent[0].1 > sent[1].1, "{sent:?}");
    assert!(sent.iter().all(|(tail, _)| tail != &[30]), "{sent:?}");
    // Behind the first round, what is accepted of it and then another token: never the rejected one.
    assert!(sent.iter().any(|(tail, _)| tail == &[10, 20]), "{sent:?}");
    assert!(sent.iter().all(|(tail, _)| tail != &[10, 10]), "{sent:?}");
    let mut tails: Vec<_> = sent.iter().map(|(tail, _)| tail).collect();
    tails.sort();
    tails.dedup();
    assert_eq!(tails.len(), sent.len());
    assert!(sent.len() < MOST);
    // In company there is less of it, but never nothing.
    let steps = |explorers| {
        let sent = explore(&mut Prospects::new(0, ROOM, true), odds(explorers));
        sent.iter().map(|(_, length)| length).sum::<usize>()
    };
    assert!(steps(8) < steps(1) / 2, "{} and {}", steps(8), steps(1));
    assert!(steps(1_000) > 0);
}

#[test]
fn how_long_a_round_is_does_not_depend_on_what_is_drawn() {
    let lengths = [[0.999, 0.001], [0.001, 0.999]].map(|probs| {
        let mut prospects = Prospects::new(0, ROOM, true);
        prospects.choose(odds(1), &room);
        look(&mut prospects, &[(10, 0.5)]);
        prospects.choose(odds(1), &room);
        let q = SparseDistribution {
            ids: vec![1, 2],
            probs: probs.to_vec(),
        };
        let token = DraftToken {
            token: 1,
            q: Some(q),
        };
        let draws = (1..).find(|_| prospects.draw(token.clone(), doubt(&token)).is_some());
        draws.unwrap()
    });
    assert_eq!(lengths[0], lengths[1]);
    assert!(lengths[0] < ROOM);
}

#[test]
fn no_more_is_drafted_than_the_target_holds() {
    let odds = Odds {
        most_tokens: 20,
        ..odds(1)
    };
    let sent = explore(&mut Prospects::new(0, ROOM, true), odds);
    let tokens: usize = sent.iter().map(|(_, length)| length).sum();
    assert!((20..20 + ROOM).contains(&tokens), "{sent:?}");
}

#[test]
fn what_comes_true_keeps_what_was_drafted_behind_it() {
    let mut prospects = Prospects::new(0, ROOM, true);
    let sent = explore(&mut prospects, odds(1));
    let behind = |tail: &[u32]| sent.iter().filter(|(t, _)| t.starts_with(tail)).count();
    assert_eq!(prospects.advance(&[40], 1, true), Advanced::Lost);
    assert_ne!(prospects.advance(&[10], 1, true), Advanced::Lost);
    assert_eq!(prospects.all.len(), behind(&[10]));
    assert_eq!(prospects.judged().len(), sent[0].1);
    assert!((prospects.all[0].chance - 1.0).abs() < 1e-9);
    // Another epoch is another text: that one was withdrawn.
    assert_eq!(prospects.advance(&[10, 20], 1, true), Advanced::Lost);
    assert_ne!(prospects.advance(&[10, 20], 2, true), Advanced::Lost);
    assert_eq!(prospects.all.len(), behind(&[10, 10, 20]));
    assert!(
        prospects
            .all
            .iter()
            .all(|p| p.depth <= MOST_DEPTH && p.parent < prospects.all.len())
    );
}

#[test]
fn a_round_that_is_not_whole_when_its_turn_comes_is_finished_for_who_waits() {
    for unawaited in [false, true] {
        let mut prospects = Prospects::new(0, ROOM, true);
        assert!(prospects.choose(odds(1), &room));
        look(&mut prospects, &[(10, 0.9)]);
        assert!(prospects.choose(odds(1), &room));
        look(&mut prospects, &[(11, 0.9)]);
        assert!(prospects.draw(drawn(11), Some(0.5)).is_none());
        let advanced = prospects.advance(&[10], 1, unawaited);
        let expected = if unawaited {
            Advanced::Moved
        } else {
            Advanced::Kept
        };
        assert_eq!(advanced, expected);
        assert!(prospects.judged().is_empty());
        assert!(prospects.choose(odds(1), &room));
        let text: Vec<u32> = prospects.text().collect();
        // A step alone is guessed by what is known of it already.
        assert_eq!(text, [11]);
        assert_eq!(prospects.progress().0, usize::from(!unawaited));
    }
}
