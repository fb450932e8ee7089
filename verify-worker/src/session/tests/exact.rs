//! Runs, confirmations and withdrawals: the exact mode, and sparse mode under oversight.

use specattn_engine::sampling::Purpose;

use super::*;

fn exact(limit: usize, confirm_length: u32) -> SessionSpec {
    SessionSpec {
        mode: Mode::Exact,
        check: CheckedCheckPolicy {
            confirm_length: Some(confirm_length),
            ..CheckedCheckPolicy::default()
        },
        provisional: true,
        ..spec(limit)
    }
}

/// A draft worker's side: what it was told, and masks.
struct Drafter {
    draft: Draft,
    encoder: Encoder,
    /// The session's tokens, as far as told.
    view: Vec<u32>,
    mask_p: Option<f32>,
}

impl Drafter {
    fn join(bench: &mut Bench) -> Self {
        let mut draft = bench.join(1);
        let welcome = draft.welcome();
        Self {
            view: [&[3], welcome.tokens.as_slice()].concat(),
            draft,
            encoder: Encoder::new(),
            mask_p: None,
        }
    }

    /// Proposes these tokens, with a mask, on what it knows.
    fn propose(&mut self, bench: &mut Bench, tokens: &[u32]) {
        let n = self.view.len();
        let mask = RoundMask {
            context_len: n - 1,
            granularity: 1,
            sources: vec![PositionSet::from_positions(n - 1, [0])],
        };
        let part = ProposalPart {
            epoch: bench.session.epoch,
            base: n as u64,
            pending_token: self.view[n - 1],
            mask: self.encoder.encode(&mask),
            ..self.draft.part(tokens)
        };
        bench.session.receive(self.draft.id, part);
    }

    /// Takes what it was told; `tokens` are those it proposed last.
    fn listen(&mut self, tokens: &[u32]) {
        while let Ok(event) = self.draft.events.try_recv() {
            let LinkEvent::Verdict(verdict) = event else {
                panic!("{event:?}");
            };
            if verdict.judged {
                assert_eq!(verdict.base, self.view.len());
                self.view.extend(&tokens[..verdict.accepted]);
            } else {
                assert!(verdict.base <= self.view.len());
                self.view.truncate(verdict.base);
            }
            self.view.extend(&verdict.next_tokens);
            self.mask_p = verdict.mask_p.or(self.mask_p);
        }
    }
}

/// Every other draft token right, by what masked passes see.
fn guesses(bench: &Bench, view: &[u32], count: usize) -> Vec<u32> {
    let mut text = view.to_vec();
    for _ in 0..count {
        let position = text.len() - 1;
        let misread = usize::from((bench.misread)(position)) as u32;
        text.push((next(text[position], position) + misread) % VOCAB as u32);
    }
    text.split_off(view.len())
}

#[test]
fn a_run_is_confirmed_at_its_length_together_with_a_round() {
    let mut bench = Bench::new(exact(60, 4));
    let mut drafter = Drafter::join(&mut bench);
    bench.step();
    let right = continuation(&[3, 1, 4], 60);
    // Three tokens, then three more: provisional.
    for m in [3, 6] {
        let guess = guesses(&bench, &drafter.view, 2);
        drafter.propose(&mut bench, &guess);
        bench.step();
        assert!(bench.session.stats.kv.read > 0);
        drafter.listen(&guess);
        assert_eq!(drafter.view, right[..m + 3]);
        assert_eq!(bench.session.len(), 3);
    }
    assert_eq!(bench.session.stats.check_forwards, 0);
    // The third round rides on the confirmation: six tokens, two more and a bonus.
    let guess = guesses(&bench, &drafter.view, 2);
    drafter.propose(&mut bench, &guess);
    assert_eq!(bench.session.plan(bench.now), Plan::Run);
    assert_eq!(bench.session.input(), &right[2..11]);
    assert!(bench.session.lists().is_none());
    settle_planned(&mut bench);
    drafter.listen(&guess);
    assert_eq!(drafter.view, right[..12]);
    assert_eq!(bench.session.len(), 12);
    let stats = bench.session.stats;
    assert_eq!(
        (
            stats.check_forwards,
            stats.provisional_tokens,
            stats.confirmed_tokens,
            stats.rollbacks
        ),
        (1, 6, 6, 0)
    );
    let events = bench.drain_events();
    let Some(Event::Committed {
        start: 3, tokens, ..
    }) = events.last()
    else {
        panic!("{events:?}");
    };
    assert_eq!(tokens, &right[3..12]);
}

#[test]
fn what_the_dense_pass_would_not_say_is_withdrawn_everywhere() {
    let mut bench = Bench::new(exact(60, 4));
    // Masked passes are wrong about the token at index 5.
    bench.misread = |position| position == 4;
    let mut drafter = Drafter::join(&mut bench);
    bench.step();
    let right = continuation(&[3, 1, 4], 60);
    let guess = guesses(&bench, &drafter.view, 4);
    drafter.propose(&mut bench, &guess);
    bench.step();
    drafter.listen(&guess);
    assert_eq!(drafter.view.len(), 8);
    assert_ne!(drafter.view[5], right[5]);
    let shown = bench.drain_events();
    assert!(
        matches!(shown.last(), Some(Event::Provisional { start: 3, tokens }) if tokens.len() == 5)
    );
    let guess = guesses(&bench, &drafter.view, 4);
    let epoch = bench.session.epoch;
    drafter.propose(&mut bench, &guess);
    bench.step();
    drafter.listen(&guess);
    // Two confirmed, the third recovered; the round that rode along is answered, not judged.
    assert_eq!(drafter.view, right[..6]);
    assert_eq!(bench.session.tokens, right[..6]);
    assert_eq!(bench.session.epoch, epoch + 1);
    let committed = Event::Committed {
        start: 3,
        tokens: right[3..6].to_vec(),
        origins: vec![Origin::Accepted, Origin::Accepted, Origin::Recovered],
        logprobs: Vec::new(),
    };
    assert_eq!(
        bench.drain_events(),
        [Event::RolledBack { to: 5 }, committed]
    );
    let stats = bench.session.stats;
    assert_eq!((stats.provisional_tokens, stats.confirmed_tokens), (5, 2));
    assert_eq!((stats.proposed_tokens, stats.accepted_tokens), (4, 4));
}

#[test]
fn a_lost_draft_leaves_a_run_that_is_confirmed_at_once() {
    let mut bench = Bench::new(exact(60, 40));
    let mut drafter = Drafter::join(&mut bench);
    bench.step();
    let right = continuation(&[3, 1, 4], 60);
    let guess = guesses(&bench, &drafter.view, 4);
    drafter.propose(&mut bench, &guess);
    bench.step();
    bench.session.leave(drafter.draft.id, None);
    assert_eq!(bench.step(), Some(None));
    assert_eq!(bench.session.tokens, right[..9]);
    assert_eq!(bench.session.len(), 9);
    // Alone it goes on like any session.
    assert_eq!(bench.run(), Ending::Length);
    assert_eq!(bench.session.tokens, right);
    assert_eq!(bench.session.stats.check_forwards, 1);
}

#[test]
fn a_provisional_stop_token_ends_the_text_only_when_confirmed() {
    let right = continuation(&[3, 1, 4], 60);
    for misread in [false, true] {
        let mut bench = Bench::new(exact(60, 40));
        let wrong = (right[6] + 1) % 16;
        let stop = if misread { wrong } else { right[6] };
        if misread {
            bench.misread = |position| position == 5;
        }
        bench.session.spec.stop_tokens = vec![stop];
        let mut drafter = Drafter::join(&mut bench);
        bench.step();
        let guess = guesses(&bench, &drafter.view, 4);
        drafter.propose(&mut bench, &guess);
        bench.step();
        // The round is not answered: its text may be over.
        assert_eq!(*bench.session.tokens.last().unwrap(), stop);
        assert!(drafter.draft.events.try_recv().is_err());
        let ending = bench.step().unwrap();
        if misread {
            assert_eq!(ending, None);
            drafter.listen(&guess);
            let expected = &right[..7];
            assert_eq!(bench.session.tokens, expected);
            assert_eq!(drafter.view, expected);
        } else {
            assert_eq!(ending, Some(Ending::Stop));
            let first = right[3..].iter().position(|&t| t == stop).unwrap() + 3;
            assert_eq!(bench.session.tokens, right[..=first]);
        }
    }
}

#[test]
fn logprobs_are_those_of_the_dense_pass() {
    let mut bench = Bench::new(SessionSpec {
        sampling: SamplingParams {
            logprobs: Some(1),
            ..SamplingParams::default()
        },
        ..exact(60, 2)
    });
    bench.misread = |position| position == 4;
    let mut drafter = Drafter::join(&mut bench);
    bench.step();
    for _ in 0..2 {
        let guess = guesses(&bench, &drafter.view, 2);
        drafter.propose(&mut bench, &guess);
        bench.step();
        drafter.listen(&guess);
    }
    let events = bench.drain_events();
    let Some(Event::Committed {
        tokens, logprobs, ..
    }) = events.last()
    else {
        panic!("{events:?}");
    };
    assert_eq!((tokens.len(), logprobs.len()), (3, 3));
    for (token, logprobs) in tokens.iter().zip(logprobs) {
        assert_eq!(logprobs.top[0].0, *token);
    }
}

/// Whatever drafts and masks are like, and whoever comes and goes: the target's own text.
#[test]
fn greedy_text_is_the_targets_own_whatever_happens() {
    for seed in 0..300 {
        let rng = CounterRng::new(seed);
        let mut draws = 0;
        let mut pick = |most: usize| {
            draws += 1;
            (rng.uniform(draws, Purpose::Next) * most as f64) as usize
        };
        let limit = 4 + pick(60);
        let mut asked = exact(limit, 1 + pick(12) as u32);
        if pick(3) == 0 {
            asked.check.confirm_length = None;
        }
        if pick(2) == 0 {
            asked.stop_tokens = vec![pick(VOCAB) as u32];
        }
        let stops = asked.stop_tokens.clone();
        let mut bench = Bench::new(asked);
        let patterns: [fn(usize) -> bool; 4] = [|_| false, |_| true, |p| p % 5 == 0, |p| p % 7 < 2];
        bench.misread = patterns[pick(4)];
        let mut drafter: Option<Drafter> = None;
        let mut proposed = Vec::new();
        let ending = loop {
            match (&mut drafter, pick(12)) {
                (Some(gone), 0) => {
                    bench.session.leave(gone.draft.id, None);
                    drafter = None;
                }
                (None, 1..6) => drafter = Some(Drafter::join(&mut bench)),
                (Some(drafter), 2..) => {
                    proposed = guesses(&bench, &drafter.view, 1 + pick(4));
                    if pick(3) == 0 {
                        let at = pick(proposed.len());
                        proposed[at] = pick(VOCAB) as u32;
                    }
                    drafter.propose(&mut bench, &proposed);
                }
                _ => {}
            }
            match bench.step() {
                Some(Some(ending)) => break ending,
                Some(None) => {}
                None => bench.now += TIMEOUT,
            }
            if let Some(drafter) = &mut drafter {
                drafter.listen(&proposed);
            }
        };
        let mut expected = continuation(&[3, 1, 4], limit);
        let stop = expected[3..].iter().position(|t| stops.contains(t));
        if let Some(stop) = stop {
            expected.truncate(3 + stop + 1);
        }
        assert_eq!(bench.session.tokens, expected, "seed {seed}");
        let reason = if stop.is_some() {
            Ending::Stop
        } else {
            Ending::Length
        };
        assert_eq!(ending, reason, "seed {seed}");
    }
}

#[test]
fn a_refresh_feeds_the_run_again_and_commits_on() {
    let mut bench = Bench::new(SessionSpec {
        mode: Mode::Sparse,
        check: CheckedCheckPolicy {
            refresh_every: Some(5),
            max_kl: Some(0.01),
            ..CheckedCheckPolicy::default()
        },
        mask_p: Some(0.9),
        ..spec(60)
    });
    let mut drafter = Drafter::join(&mut bench);
    assert!(bench.session.spec.policy.p >= 0.9);
    bench.step();
    let right = continuation(&[3, 1, 4], 60);
    for n in [3, 6] {
        let guess = guesses(&bench, &drafter.view, 2);
        drafter.propose(&mut bench, &guess);
        bench.step();
        drafter.listen(&guess);
        assert_eq!(bench.session.len(), n + 3);
    }
    let guess = guesses(&bench, &drafter.view, 2);
    drafter.propose(&mut bench, &guess);
    assert_eq!(bench.session.plan(bench.now), Plan::Run);
    assert!(bench.session.lists().is_none());
    assert_eq!(bench.session.input(), &right[2..11]);
    settle_planned(&mut bench);
    drafter.listen(&guess);
    assert_eq!(bench.session.tokens, right[..12]);
    assert_eq!(drafter.view, right[..12]);
    let stats = bench.session.stats;
    assert_eq!((stats.check_forwards, stats.provisional_tokens), (1, 0));
    let (kl, samples) = bench.session.oversight.divergence();
    assert_eq!((kl, samples), (0.0, 6));
    assert_eq!(bench.run(), Ending::Length);
    assert_eq!(bench.session.tokens, right);
}

#[test]
fn a_leash_measures_every_token_and_tightens() {
    let mut bench = Bench::new(SessionSpec {
        mode: Mode::Sparse,
        check: CheckedCheckPolicy {
            refresh_every: Some(4),
            max_kl: Some(0.01),
            ..CheckedCheckPolicy::default()
        },
        mask_p: Some(0.9),
        ..spec(200)
    });
    bench.misread = |_| true;
    let mut drafter = Drafter::join(&mut bench);
    let first = bench.session.spec.policy.p;
    bench.step();
    for _ in 0..6 {
        let guess = guesses(&bench, &drafter.view, 2);
        drafter.propose(&mut bench, &guess);
        bench.step();
        drafter.listen(&guess);
    }
    // Logits of one at one token and zero at fifteen, shifted by a token between the passes.
    let e = std::f64::consts::E;
    let (kl, samples) = bench.session.oversight.divergence();
    assert!(samples >= 6, "{samples}");
    assert!((kl - (e - 1.0) / (e + 15.0)).abs() < 1e-6, "{kl}");
    let told = drafter.mask_p.unwrap();
    assert!(told > first && told == bench.session.spec.policy.p);
}
