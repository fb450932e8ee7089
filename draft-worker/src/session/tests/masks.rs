//! Masks on their way: what they cover, when they are sent, and what their captured steps spare the draft itself.

use specattn_mask::Term;

use super::*;
use crate::outgoing::OutgoingMask;

#[test]
fn masks_cover_the_targets_cache_and_can_start_over() {
    let term = |layer, head| Term {
        layer,
        head,
        weight: 0.5,
    };
    let sources = vec![
        Source {
            p_offset: 0.0,
            spread: None,
            terms: vec![term(1, 0), term(1, 1)],
        },
        Source {
            p_offset: 0.0,
            spread: None,
            terms: vec![term(0, 0), term(2, 1)],
        },
    ];
    let mut bench = Bench::new(spec(60));
    bench
        .session
        .join(Welcome {
            sources,
            ..welcome()
        })
        .unwrap();
    for round in 0..4 {
        bench.run();
        let proposal = bench.proposal();
        // The one after a loss is read by somebody who knows nothing.
        let OutgoingMask {
            round: mask,
            is_first,
        } = proposal.mask.unwrap();
        assert_eq!(is_first, round == 3);
        assert_eq!(
            (mask.context_len, mask.sources.len()),
            (proposal.base - 1, 2)
        );
        assert!(mask.sources.iter().all(|s| s.iter().eq([1])));
        let lost = round == 2;
        bench.judge(Verdict {
            need_full_mask: lost,
            mask_p: None,
            ..judged(proposal.base, 0, 5, round)
        });
    }
}

#[test]
fn steps_between_captured_ones_read_the_drafts_own_selection() {
    let spec = SessionSpec {
        tokens: vec![1; 200],
        drafting: Drafting {
            own: OwnPolicy {
                capture_every: 4,
                p: 0.9,
            },
            ..spec(300).drafting
        },
        ..spec(300)
    };
    let mut bench = Bench::new(spec);
    bench
        .session
        .join(Welcome {
            prompt_tokens: 200,
            policy: MaskPolicy {
                sink_tokens: 1,
                window_tokens: 8,
                ..MaskPolicy::default()
            },
            sources: vec![Source::layer_mean(1, 2)],
            ..welcome()
        })
        .unwrap();
    for (base, accepted) in [(200, 1), (202, 4), (207, 0), (208, 3)] {
        bench.reads.clear();
        bench.run();
        // The prompt's catch-up is the first round's first forward, and no draft step.
        let steps = bench.reads.split_off(bench.reads.len() - 4);
        assert_eq!(steps[0].read, steps[0].dense, "the first step is dense");
        for step in &steps[1..] {
            // Of each layer at most: position 1, the sink, the window, four steps.
            assert!(step.read <= (LAYERS * (1 + 1 + 8 + 4)) as u64, "{step:?}");
        }
        let proposal = bench.proposal();
        assert_eq!(proposal.base, base);
        let mask = proposal.mask.unwrap().round;
        assert!(mask.sources[0].iter().eq([1]));
        // What it says it read is what it read, the prompt left out.
        let mut read = KvReads::default();
        for step in steps {
            read += step;
        }
        assert_eq!(proposal.kv, read);
        bench.judge(judged(base, accepted, 5, 0));
    }
}

#[test]
fn a_verdict_changes_the_mass_of_masks() {
    let source = Source {
        p_offset: 0.0,
        spread: None,
        terms: vec![Term {
            layer: 0,
            head: 0,
            weight: 1.0,
        }],
    };
    let mut bench = Bench::new(spec(30));
    let welcome = Welcome {
        sources: vec![source],
        ..welcome()
    };
    bench.session.join(welcome).unwrap();
    bench.run();
    bench.proposal();
    let verdict = Verdict {
        mask_p: Some(0.5),
        ..judged(3, 4, 11, 0)
    };
    bench.judge(verdict);
    assert!(format!("{:?}", bench.session.joined).contains("p: 0.5"));
}

#[test]
fn a_long_mask_is_sent_once_no_step_can_change_it() {
    // A mask of 100,000 positions, and one of fewer.
    for (sources, capture_every, parts) in [
        (25, 1, vec![(0, 4, true)]),
        (25, 4, vec![(0, 1, true), (1, 3, false)]),
        (25, 2, vec![(0, 3, true), (3, 1, false)]),
        (24, 4, vec![(0, 4, true)]),
    ] {
        let mut spec = SessionSpec {
            tokens: vec![1; 4_001],
            ..spec(5_000)
        };
        spec.drafting.own.capture_every = capture_every;
        let mut bench = Bench::new(spec);
        bench
            .session
            .join(Welcome {
                prompt_tokens: 4_001,
                sources: vec![Source::layer_mean(1, 2); sources],
                ..welcome()
            })
            .unwrap();
        bench.run();
        // The first round is announced.
        assert!(bench.proposal().mask.is_some());
        for base in [4_001, 4_006] {
            bench.judge(judged(base, 4, 11, 0));
            bench.run();
            let sent = std::iter::from_fn(|| bench.proposals.try_recv().ok());
            let sent: Vec<_> = sent
                .map(|part| {
                    let context_len = part.mask.as_ref().map(|mask| mask.round.context_len);
                    assert!(context_len.is_none_or(|len| len == base + 4));
                    (part.offset, part.draft.len(), context_len.is_some())
                })
                .collect();
            assert_eq!(sent, parts, "capture_every {capture_every}");
        }
    }
}
