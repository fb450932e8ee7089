use specattn_mask::{Encoder, LayerMap, MaskPolicy, PositionSet, RoundMask};

use super::*;
use crate::waiting::MOST_IN_ORDER;

fn link(greedy: bool) -> (DraftLink, mpsc::Receiver<LinkEvent>) {
    let (sender, receiver) = mpsc::channel(2);
    let new = NewLink {
        id: LinkId(1),
        sender,
        slots: Arc::new(Semaphore::new(1)),
        timeout: Duration::from_millis(10),
    };
    let terms = Terms {
        draft_length: 4,
        greedy,
    };
    (DraftLink::new(new, terms, None, 3), receiver)
}

fn part(sequence: u64, offset: usize, tokens: &[u32], last: bool) -> ProposalPart {
    ProposalPart {
        epoch: 0,
        base: 3,
        sequence,
        pending_token: 9,
        offset,
        tokens: tokens.to_vec(),
        q: Vec::new(),
        mask: Vec::new(),
        last,
        pacing: Pacing::InOrder,
        assumed: Vec::new(),
        reads: DraftReads::default(),
    }
}

fn tokens(next: Option<(Proposal, MaskRead)>) -> Option<Vec<u32>> {
    next.map(|(p, _)| p.draft.iter().map(|d| d.token).collect())
}

#[test]
fn split_proposals_are_put_together_and_re_sends_dropped() {
    let (mut link, _receiver) = link(true);
    link.receive(part(1, 0, &[1, 2], false)).unwrap();
    assert_eq!(link.next_proposal(), None);
    link.receive(part(1, 0, &[1, 2], false)).unwrap();
    link.receive(part(2, 2, &[3], true)).unwrap();
    link.receive(part(2, 2, &[3], true)).unwrap();
    assert_eq!(tokens(link.next_proposal()), Some(vec![1, 2, 3]));
    assert_eq!(link.next_proposal(), None);
    // A round that begins anew forgets the one begun before.
    link.receive(part(3, 0, &[7], false)).unwrap();
    link.receive(part(4, 0, &[8], true)).unwrap();
    assert_eq!(tokens(link.next_proposal()), Some(vec![8]));
}

fn masked_link() -> (DraftLink, mpsc::Receiver<LinkEvent>) {
    let map = Arc::new(LayerMap::proportional(1, 1, 1, 1));
    let (mut link, receiver) = link(true);
    link.masks = Some(MaskReader::new(map, MaskPolicy::default(), 100));
    (link, receiver)
}

fn mask(context_len: usize) -> RoundMask {
    RoundMask {
        context_len,
        granularity: 1,
        sources: vec![PositionSet::from_positions(context_len, [1])],
    }
}

#[test]
fn masks_are_read_once_and_in_order_ahead_or_when_their_turn_comes() {
    for ahead in [0, 1, 3] {
        let (mut link, _receiver) = masked_link();
        // The second mask is a delta against the first, the third one none at all.
        let mut encoder = Encoder::new();
        let masks = [encoder.encode(&mask(2)), encoder.encode(&mask(6)), vec![9]];
        for (round, mask) in masks.into_iter().enumerate() {
            link.receive(ProposalPart {
                base: 3 + 4 * round as u64,
                mask,
                ..part(1 + round as u64, 0, &[1], true)
            })
            .unwrap();
        }
        let mut read = || {
            (0..ahead).for_each(|_| link.read_mask());
            link.next_proposal().unwrap().1.unwrap()
        };
        assert_eq!(read(), Ok(Masking::Ready));
        assert_eq!(read(), Ok(Masking::Ready));
        assert_eq!(read().unwrap_err().label(), "invalid_argument");
    }
}

#[test]
fn masks_are_read_before_their_rounds_are_whole() {
    let mut encoder = Encoder::new();
    let [first, second, third] = [2, 6, 10].map(|context_len| encoder.encode(&mask(context_len)));
    let with = |sequence, base, offset, last, mask: &Vec<u8>| ProposalPart {
        base,
        mask: mask.clone(),
        ..part(sequence, offset, &[1], last)
    };
    let none = Vec::new();
    for early in [true, false] {
        let (mut link, _receiver) = masked_link();
        link.receive(with(1, 3, 0, false, &first)).unwrap();
        assert!(link.has_unread_mask());
        if early {
            link.read_mask();
            assert!(!link.has_unread_mask());
        }
        assert_eq!(link.next_proposal(), None);
        // That round is given up; its mask was the base of the next.
        link.receive(with(2, 7, 0, false, &second)).unwrap();
        link.receive(with(3, 7, 1, true, &none)).unwrap();
        // Another round begins before the one before was judged: its mask has to wait.
        link.receive(with(4, 11, 0, false, &third)).unwrap();
        if early {
            link.read_mask();
            link.read_mask();
        }
        let (proposal, masking) = link.next_proposal().unwrap();
        assert_eq!(
            (proposal.draft.len(), masking),
            (2, Some(Ok(Masking::Ready)))
        );
        assert!(link.has_unread_mask());
        link.receive(with(5, 11, 1, true, &none)).unwrap();
        assert_eq!(link.next_proposal().unwrap().1, Some(Ok(Masking::Ready)));
    }
}

#[test]
fn a_mask_whose_base_was_given_up_unread_is_asked_for_again() {
    // Given up behind a round that waits, and as the first of all.
    for given_up in [3, 1] {
        let mut encoder = Encoder::new();
        let (mut link, _receiver) = masked_link();
        for (sequence, context_len) in [(1, 2), (3, 6), (5, 10)] {
            link.receive(ProposalPart {
                base: 1 + context_len as u64,
                mask: encoder.encode(&mask(context_len)),
                ..part(sequence, 0, &[1], sequence != given_up)
            })
            .unwrap();
        }
        let mut read = || link.next_proposal().unwrap().1.unwrap().unwrap();
        if given_up == 3 {
            assert_eq!(read(), Masking::Ready);
        }
        assert_eq!(read(), Masking::MissingBase);
    }
}

#[test]
fn malformed_proposals_are_refused() {
    let cases: [(&str, ProposalPart); 6] = [
        ("empty", part(1, 0, &[], true)),
        ("long", part(1, 0, &[1; 5], true)),
        ("offset", part(1, 1, &[1], true)),
        ("far offset", part(1, usize::MAX, &[1], true)),
        (
            "mask",
            ProposalPart {
                mask: vec![1],
                ..part(1, 0, &[1], true)
            },
        ),
        (
            "q",
            ProposalPart {
                q: vec![SparseDistribution::default()],
                ..part(1, 0, &[1], true)
            },
        ),
    ];
    for (name, bad) in cases {
        let (mut link, _receiver) = link(true);
        let fault = link.receive(bad).unwrap_err();
        assert_eq!(fault.label(), "invalid_argument", "{name}");
    }
    let (mut sampled, _receiver) = link(false);
    assert!(sampled.receive(part(1, 0, &[1], true)).is_err());
    let (mut twice, _receiver) = masked_link();
    let with_mask = |sequence, offset| ProposalPart {
        mask: Encoder::new().encode(&mask(2)),
        ..part(sequence, offset, &[1], false)
    };
    twice.receive(with_mask(1, 0)).unwrap();
    assert!(twice.receive(with_mask(2, 1)).is_err());
    let (mut split, _receiver) = link(true);
    split.receive(part(1, 0, &[1], false)).unwrap();
    let other = ProposalPart {
        base: 4,
        ..part(2, 1, &[1], true)
    };
    assert!(split.receive(other).is_err());
}

#[test]
fn few_proposals_may_wait() {
    let (mut link, _receiver) = link(true);
    for sequence in 1..=MOST_IN_ORDER as u64 {
        link.receive(part(sequence, 0, &[1], true)).unwrap();
    }
    let fault = link.receive(part(99, 0, &[1], true)).unwrap_err();
    assert_eq!(fault.label(), "resource_exhausted");
}

#[test]
fn a_busy_draft_is_told_later_and_all() {
    let (mut link, mut receiver) = link(true);
    let committed: Vec<u32> = (0..10).collect();
    for n in 4..=7 {
        link.catch_up(5, &committed[..n]).unwrap();
    }
    let told = |event| match event {
        LinkEvent::Verdict(v) => (v.base, v.next_tokens),
        other => panic!("{other:?}"),
    };
    assert_eq!(told(receiver.try_recv().unwrap()), (3, vec![3]));
    assert_eq!(told(receiver.try_recv().unwrap()), (4, vec![4]));
    // The channel was full for the next two: both come with the one after.
    link.catch_up(5, &committed[..8]).unwrap();
    assert_eq!(told(receiver.try_recv().unwrap()), (5, vec![5, 6, 7]));
    link.judge(5, 1, &[9]).unwrap();
    assert_eq!(told(receiver.try_recv().unwrap()), (8, vec![9]));
    assert_eq!(link.told, 10);
    drop(receiver);
    assert_eq!(
        link.catch_up(5, &committed).unwrap_err().label(),
        "unavailable"
    );
}

#[test]
fn the_end_of_a_link_ends_its_reader() {
    let (link, _receiver) = link(true);
    let slots = Arc::clone(&link.slots);
    drop(link);
    assert!(slots.is_closed());
}
