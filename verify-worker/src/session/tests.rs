//! The state machine alone: forwards are scripted, channels are read at their other ends.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use specattn_engine::{KvReads, StepOutput};
use specattn_mask::{Encoder, LayerMap, PositionSet, RoundMask};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::Stream;

use super::*;
use crate::draft_link::{LinkId, NewLink, ProposalPart, Verdict, Welcome};
use crate::draft_reads::DraftReads;
use crate::events::{self, Event, Events};
use crate::origin::Origin;

mod ahead;

const VOCAB: usize = 16;
const TIMEOUT: Duration = Duration::from_millis(10);

/// The scripted target: after token t at position p comes (t + p) mod 16.
fn next(token: u32, position: usize) -> u32 {
    (token + position as u32) % VOCAB as u32
}

/// The target's greedy continuation of `tokens`, up to `len` tokens in all.
fn continuation(tokens: &[u32], len: usize) -> Vec<u32> {
    let mut all = tokens.to_vec();
    while all.len() < len {
        all.push(next(all[all.len() - 1], all.len() - 1));
    }
    all
}

fn spec(limit: usize) -> SessionSpec {
    SessionSpec {
        id: SessionId::from_bits(7),
        tokens: vec![3, 1, 4],
        prompt_tokens: 3,
        limit,
        sampling: SamplingParams::default(),
        stop_tokens: Vec::new(),
        policy: MaskPolicy::default(),
        mask_p: None,
        mode: Mode::Dense,
        check: CheckedCheckPolicy::default(),
        provisional: false,
        draft_length: 4,
        draft_while_it_pays: false,
        capability: None,
    }
}

struct Bench {
    session: Session,
    events: Events,
    cache: Vec<u32>,
    now: Instant,
    /// Where masked passes see something else.
    misread: fn(usize) -> bool,
}

impl Bench {
    fn new(spec: SessionSpec) -> Self {
        let (outbox, events) = events::channel(spec.tokens.len(), Duration::ZERO, || {});
        Self {
            session: Session::new(spec, VOCAB, outbox, &Shared::default()).unwrap(),
            events,
            cache: Vec::new(),
            now: Instant::now(),
            misread: |_| false,
        }
    }

    /// Plans and runs one forward; `None` when the session would rather wait.
    fn step(&mut self) -> Option<Option<Ending>> {
        if self.session.plan(self.now) != Plan::Run {
            return None;
        }
        self.forget();
        let input = self.session.input().to_vec();
        let mut logits = Vec::new();
        for (row, &token) in input.iter().enumerate() {
            let mut values = [0.0_f32; VOCAB];
            let position = self.cache.len() + row;
            let misread = self.session.lists().is_some() && (self.misread)(position);
            values[(next(token, position) as usize + usize::from(misread)) % VOCAB] = 1.0;
            logits.extend(values);
        }
        self.cache.extend(&input);
        let output = StepOutput {
            logits: logits.into(),
            kv: KvReads { read: 1, dense: 2 },
            ..StepOutput::default()
        };
        let ending = self.session.settle(&output).unwrap();
        Some(ending)
    }

    /// What the engine loop does before a forward.
    fn forget(&mut self) {
        assert!(
            self.session.cached() <= self.cache.len(),
            "positions are appended in order"
        );
        self.cache.truncate(self.session.cached());
        assert_eq!(
            self.cache,
            self.session.tokens[..self.cache.len()],
            "the cache is what stands"
        );
    }

    /// Steps until the session ends; how it did.
    fn run(&mut self) -> Ending {
        loop {
            match self.step() {
                Some(Some(ending)) => return ending,
                Some(None) => {}
                None => self.now += TIMEOUT,
            }
        }
    }

    fn join(&mut self, known: u64) -> Draft {
        let (sender, events) = mpsc::channel(16);
        let new = NewLink {
            id: LinkId(known + 100),
            sender,
            slots: Arc::new(Semaphore::new(1)),
            timeout: TIMEOUT,
        };
        let map = Arc::new(LayerMap::proportional(2, 1, 1, 1));
        self.session.join(new, known, map).unwrap();
        Draft {
            id: LinkId(known + 100),
            events,
            sequence: 0,
        }
    }

    fn propose(&mut self, draft: &mut Draft, tokens: &[u32]) {
        let n = self.session.tokens.len();
        let part = ProposalPart {
            epoch: self.session.epoch,
            base: n as u64,
            pending_token: self.session.tokens[n - 1],
            ..draft.part(tokens)
        };
        self.session.receive(draft.id, part);
    }

    fn drain_events(&mut self) -> Vec<Event> {
        let mut context = Context::from_waker(Waker::noop());
        let mut drained = Vec::new();
        while let Poll::Ready(Some(event)) = Pin::new(&mut self.events).poll_next(&mut context) {
            drained.push(event);
        }
        drained
    }
}

struct Draft {
    id: LinkId,
    events: mpsc::Receiver<LinkEvent>,
    sequence: u64,
}

impl Draft {
    fn part(&mut self, tokens: &[u32]) -> ProposalPart {
        self.sequence += 1;
        ProposalPart {
            epoch: 0,
            base: 0,
            sequence: self.sequence,
            pending_token: 0,
            offset: 0,
            tokens: tokens.to_vec(),
            q: Vec::new(),
            mask: Vec::new(),
            last: true,
            pacing: Pacing::InOrder,
            assumed: Vec::new(),
            reads: DraftReads::default(),
        }
    }

    fn verdict(&mut self) -> Verdict {
        match self.events.try_recv() {
            Ok(LinkEvent::Verdict(verdict)) => verdict,
            other => panic!("no verdict but {other:?}"),
        }
    }

    fn welcome(&mut self) -> Box<Welcome> {
        match self.events.try_recv() {
            Ok(LinkEvent::Welcome(welcome)) => welcome,
            other => panic!("no welcome but {other:?}"),
        }
    }
}

mod exact;

#[test]
fn alone_it_decodes_to_the_limit() {
    let mut bench = Bench::new(spec(10));
    assert_eq!(bench.run(), Ending::Length);
    let expected = continuation(&[3, 1, 4], 10);
    assert_eq!(bench.session.tokens, expected);
    let stats = bench.session.stats;
    assert_eq!(
        (
            stats.target_forwards,
            stats.solo_forwards,
            stats.completion_tokens
        ),
        (7, 7, 7)
    );
    assert_eq!(stats.kv, KvReads { read: 7, dense: 14 });
    let committed = Event::Committed {
        start: 3,
        tokens: expected[3..].to_vec(),
        origins: vec![Origin::Solo; 7],
        logprobs: Vec::new(),
    };
    assert_eq!(bench.drain_events(), [Event::Opened, committed]);
}

#[test]
fn long_prompts_come_in_chunks_and_a_token_alone_needs_none() {
    let mut long = Bench::new(SessionSpec {
        tokens: vec![1; 1_200],
        prompt_tokens: 1_200,
        ..spec(1_201)
    });
    let mut chunks = Vec::new();
    while long.session.plan(long.now) == Plan::Run && long.session.logit_rows() == LogitRows::None {
        chunks.push(long.session.input().len());
        long.step();
    }
    assert_eq!(chunks, [256, 256, 256, 256, 175]);
    let mut single = Bench::new(SessionSpec {
        tokens: vec![5],
        prompt_tokens: 1,
        ..spec(2)
    });
    assert_eq!(single.step(), Some(Some(Ending::Length)));
    assert_eq!(single.session.tokens, [5, 5]);
}

#[test]
fn proposals_that_became_stale_take_no_room() {
    let mut bench = Bench::new(spec(40));
    let mut draft = bench.join(3);
    draft.welcome();
    bench.step();
    for _ in 0..6 {
        let stale = draft.part(&[1, 2]);
        bench.session.receive(draft.id, stale);
    }
    let right = continuation(&[3, 1, 4], 7);
    bench.propose(&mut draft, &right[3..]);
    bench.step();
    let verdict = std::iter::repeat_with(|| draft.verdict()).find(|verdict| verdict.judged);
    assert_eq!(verdict.unwrap().accepted, 4);
    assert_eq!(bench.session.stats.stale_proposals, 6);
}

#[test]
fn a_draft_that_guessed_another_bonus_begins_again() {
    let mut bench = Bench::new(spec(40));
    let mut draft = bench.join(3);
    draft.welcome();
    bench.step();
    let right = continuation(&[3, 1, 4], 20);
    let round = |draft: &mut Draft, base: usize, pending_token: u32| ProposalPart {
        base: base as u64,
        pending_token,
        ..draft.part(&right[base..base + 2])
    };
    let mut accepted = 0;
    for turn in 0..3 {
        // What waits before each turn follows a bonus that never came.
        let base = 3 + 3 * turn;
        for (base, pending) in [(base, right[base - 1]), (base + 3, right[base + 2] + 1)] {
            let part = round(&mut draft, base, pending);
            bench.session.receive(draft.id, part);
        }
        let ahead = round(&mut draft, base + 6, right[base + 5]);
        bench.session.receive(draft.id, ahead);
        bench.step();
        let verdict = std::iter::repeat_with(|| draft.verdict()).find(|verdict| verdict.judged);
        accepted += verdict.unwrap().accepted;
    }
    assert_eq!(accepted, 6);
    assert_eq!(bench.session.tokens, right[..12]);
    assert!(bench.session.link.is_some());
}

#[test]
fn rounds_accept_recover_and_add_a_bonus() {
    let mut bench = Bench::new(spec(40));
    let mut draft = bench.join(3);
    assert_eq!(draft.welcome().start, 3);
    bench.step();
    let right = continuation(&[3, 1, 4], 12);
    // All right: four accepted and a bonus token; the epoch stays.
    bench.propose(&mut draft, &right[3..7]);
    bench.step();
    let verdict = draft.verdict();
    assert_eq!((verdict.epoch, verdict.base, verdict.accepted), (0, 3, 4));
    assert_eq!(
        (verdict.next_tokens, verdict.judged),
        (vec![right[7]], true)
    );
    assert_eq!(bench.session.tokens, right[..8]);
    // Wrong at the second: one accepted, the target's own token recovered, the epoch raised.
    bench.propose(&mut draft, &[right[8], (right[9] + 1) % 16, 0]);
    bench.step();
    let verdict = draft.verdict();
    assert_eq!((verdict.epoch, verdict.base, verdict.accepted), (1, 8, 1));
    assert_eq!(verdict.next_tokens, [right[9]]);
    assert_eq!(bench.session.tokens, right[..10]);
    let stats = bench.session.stats;
    assert_eq!(
        (
            stats.proposed_tokens,
            stats.accepted_tokens,
            stats.rollbacks
        ),
        (7, 5, 1)
    );
}

#[test]
fn stale_proposals_are_answered_and_change_nothing() {
    let mut bench = Bench::new(spec(40));
    let mut draft = bench.join(1);
    assert_eq!(draft.welcome().tokens, [1, 4]);
    bench.step();
    bench.step();
    let verdict = draft.verdict();
    assert_eq!((verdict.epoch, verdict.base, verdict.judged), (1, 3, false));
    let right = continuation(&[3, 1, 4], 20);
    let good = |draft: &mut Draft| ProposalPart {
        epoch: 1,
        base: 4,
        pending_token: right[3],
        ..draft.part(&right[4..6])
    };
    type Spoil = fn(&mut ProposalPart);
    let spoilers: [Spoil; 6] = [
        |p| p.epoch = 0,
        |p| p.epoch = u64::MAX,
        |p| p.base = 3,
        |p| p.base = 5,
        |p| p.base = u64::MAX,
        |p| p.pending_token += 1,
    ];
    for (count, spoil) in spoilers.into_iter().enumerate() {
        let mut part = good(&mut draft);
        spoil(&mut part);
        bench.session.receive(draft.id, part);
        // The wait for a good one does not become longer by bad ones.
        assert_eq!(
            bench.session.plan(bench.now),
            Plan::Wait(Some(bench.now + TIMEOUT))
        );
        let verdict = draft.verdict();
        assert_eq!(
            (verdict.base, verdict.accepted, verdict.judged),
            (4, 0, false)
        );
        assert!(verdict.next_tokens.is_empty());
        assert_eq!(bench.session.stats.stale_proposals, count as u64 + 1);
    }
    let part = good(&mut draft);
    bench.session.receive(draft.id, part);
    bench.step();
    assert_eq!(draft.verdict().accepted, 2);
    assert_eq!(bench.run(), Ending::Length);
    assert_eq!(bench.session.tokens, continuation(&[3, 1, 4], 40));
}

#[test]
fn a_silent_draft_costs_one_timeout() {
    let mut bench = Bench::new(spec(30));
    let mut draft = bench.join(3);
    bench.step();
    let right = continuation(&[3, 1, 4], 30);
    bench.propose(&mut draft, &right[3..5]);
    bench.step();
    assert_eq!(bench.step(), None);
    bench.now += TIMEOUT;
    let start = bench.now;
    assert_eq!(bench.run(), Ending::Length);
    assert_eq!(bench.now, start);
    assert_eq!(bench.session.tokens, right);
}

#[test]
fn a_draft_whose_rounds_are_not_wanted_hears_of_everything_once_they_are() {
    let mut bench = Bench::new(SessionSpec {
        draft_while_it_pays: true,
        ..spec(100)
    });
    let right = continuation(&[3, 1, 4], 100);
    let mut draft = bench.join(3);
    draft.welcome();
    bench.step();
    // A trial of twelve rounds, then a sample of eight steps alone.
    for n in (3..39).step_by(3) {
        bench.propose(&mut draft, &right[n..n + 2]);
        bench.step();
        assert!(matches!(draft.events.try_recv(), Ok(LinkEvent::Verdict(_))));
    }
    assert_eq!(bench.session.stats.accepted_tokens, 24);
    for _ in 0..7 {
        bench.step();
        assert!(draft.events.try_recv().is_err());
    }
    bench.session.payoff.as_mut().unwrap().let_drafts_pay();
    bench.step();
    let Ok(LinkEvent::Verdict(verdict)) = draft.events.try_recv() else {
        panic!("the draft was told nothing");
    };
    assert_eq!(
        (verdict.base, &verdict.next_tokens[..]),
        (39, &right[39..47])
    );
}

#[test]
fn unknown_tokens_kill_the_link_only() {
    let mut bench = Bench::new(spec(10));
    let mut draft = bench.join(3);
    draft.welcome();
    bench.step();
    bench.propose(&mut draft, &[VOCAB as u32]);
    assert_eq!(bench.run(), Ending::Length);
    assert!(matches!(
        draft.events.try_recv(),
        Ok(LinkEvent::Failed(Fault::InvalidArgument(_)))
    ));
    assert_eq!(bench.session.tokens, continuation(&[3, 1, 4], 10));
}

#[test]
fn the_newest_draft_wins() {
    let mut bench = Bench::new(spec(10));
    let mut first = bench.join(3);
    first.welcome();
    let mut second = bench.join(2);
    assert_eq!(second.welcome().tokens, [4]);
    assert!(matches!(first.events.try_recv(), Ok(LinkEvent::Failed(_))));
    // What the first still sends, and its leaving, mean nothing.
    bench.propose(&mut first, &[1]);
    bench.session.leave(first.id, None);
    assert!(bench.session.link.is_some());
    bench.session.leave(second.id, None);
    assert!(bench.session.link.is_none());
    assert_eq!(bench.run(), Ending::Length);
}

#[test]
fn drafts_that_cannot_join_are_told_why() {
    let join = |spec: SessionSpec, known| {
        let (sender, _events) = mpsc::channel(1);
        let new = NewLink {
            id: LinkId(0),
            sender,
            slots: Arc::new(Semaphore::new(1)),
            timeout: TIMEOUT,
        };
        let map = Arc::new(LayerMap::proportional(2, 1, 1, 1));
        let fault = Bench::new(spec).session.join(new, known, map).unwrap_err();
        fault.label()
    };
    assert_eq!(join(spec(9), 4), "invalid_argument");
    assert_eq!(join(spec(9), u64::MAX), "invalid_argument");
    let none = SessionSpec {
        draft_length: 0,
        ..spec(9)
    };
    assert_eq!(join(none, 3), "failed_precondition");
}

#[test]
fn stop_tokens_and_limits_cut_a_round() {
    let right = continuation(&[3, 1, 4], 20);
    let stop_at = |index: usize, limit| {
        let mut bench = Bench::new(SessionSpec {
            stop_tokens: vec![right[index]],
            ..spec(limit)
        });
        let mut draft = bench.join(3);
        draft.welcome();
        bench.step();
        bench.propose(&mut draft, &right[3..7]);
        let ending = bench.step().unwrap();
        let id = bench.session.id();
        let tokens = bench.session.tokens.clone();
        bench.session.finish(ending.unwrap(), None);
        assert_eq!(
            draft.events.try_recv(),
            Ok(LinkEvent::Closed(ending.unwrap())),
            "{id}"
        );
        (ending.unwrap(), tokens)
    };
    let first = right[3..].iter().position(|&t| t == right[5]).unwrap() + 3;
    assert_eq!(stop_at(5, 20), (Ending::Stop, right[..=first].to_vec()));
    // A limit within the round clips the proposal; a stop token behind the limit does not count.
    let far = (3..20).find(|&i| !right[3..6].contains(&right[i])).unwrap();
    assert_eq!(stop_at(far, 6), (Ending::Length, right[..6].to_vec()));
}

#[test]
fn logprobs_come_with_every_token() {
    let mut bench = Bench::new(SessionSpec {
        sampling: SamplingParams {
            logprobs: Some(2),
            ..SamplingParams::default()
        },
        ..spec(20)
    });
    let mut draft = bench.join(3);
    bench.step();
    let right = continuation(&[3, 1, 4], 20);
    bench.propose(&mut draft, &[right[3], (right[4] + 1) % 16]);
    bench.step();
    let events = bench.drain_events();
    let Event::Committed {
        tokens, logprobs, ..
    } = &events[1]
    else {
        panic!("{events:?}");
    };
    assert_eq!(tokens, &right[3..5]);
    assert_eq!(logprobs.len(), 2);
    for (token, logprobs) in tokens.iter().zip(logprobs) {
        assert_eq!(logprobs.top[0].0, *token);
        assert_eq!(logprobs.top[0].1, logprobs.logprob);
    }
}

#[test]
fn masks_steer_rounds_and_their_loss_is_told() {
    let mut bench = Bench::new(SessionSpec {
        mode: Mode::Sparse,
        policy: MaskPolicy {
            window_tokens: 1,
            sink_tokens: 0,
            ..MaskPolicy::default()
        },
        ..spec(40)
    });
    let mut draft = bench.join(3);
    assert_eq!(draft.welcome().sources.len(), 1);
    bench.step();
    let right = continuation(&[3, 1, 4], 40);
    let mask = |n: usize| RoundMask {
        context_len: n - 1,
        granularity: 1,
        sources: vec![PositionSet::from_positions(n - 1, [1])],
    };
    let mut encoder = Encoder::new();
    let propose = |bench: &mut Bench, draft: &mut Draft, mask: Vec<u8>| {
        let n = bench.session.tokens.len();
        let part = ProposalPart {
            epoch: bench.session.epoch,
            base: n as u64,
            pending_token: right[n - 1],
            mask,
            ..draft.part(&right[n..n + 1])
        };
        bench.session.receive(draft.id, part);
        assert_eq!(bench.session.plan(bench.now), Plan::Run);
    };
    propose(&mut bench, &mut draft, encoder.encode(&mask(3)));
    let lists = bench.session.lists().unwrap();
    assert_eq!(
        (lists.lists.clone(), lists.of_head.clone()),
        (vec![PositionSet::from_positions(2, [1])], vec![0, 0])
    );
    settle_planned(&mut bench);
    assert!(!draft.verdict().need_full_mask);
    // One mask goes missing: the round after it is verified densely, and a full mask asked for.
    encoder.encode(&RoundMask {
        sources: vec![PositionSet::from_positions(4, [0, 2])],
        context_len: 4,
        granularity: 1,
    });
    propose(&mut bench, &mut draft, encoder.encode(&mask(5)));
    assert!(bench.session.lists().is_none());
    settle_planned(&mut bench);
    assert!(draft.verdict().need_full_mask);
    encoder.reset();
    propose(&mut bench, &mut draft, encoder.encode(&mask(7)));
    assert!(bench.session.lists().is_some());
    settle_planned(&mut bench);
    assert!(!draft.verdict().need_full_mask);
    assert_eq!(bench.session.stats.mask_rounds, 3);
    // A corrupt one ends the link, not the session.
    let n = bench.session.tokens.len();
    let part = ProposalPart {
        epoch: 0,
        base: n as u64,
        mask: vec![0xff; 40],
        ..draft.part(&right[n..n + 1])
    };
    bench.session.receive(draft.id, part);
    bench.step();
    assert!(matches!(
        draft.events.try_recv(),
        Ok(LinkEvent::Failed(Fault::InvalidArgument(_)))
    ));
    assert_eq!(bench.run(), Ending::Length);
    assert_eq!(bench.session.tokens, right);
}

#[test]
fn prompt_tokens_of_others_count_once_and_a_sessions_own_never() {
    let (outbox, _events) = events::channel(100, Duration::ZERO, || {});
    let spec = SessionSpec {
        tokens: vec![1; 100],
        prompt_tokens: 100,
        ..spec(200)
    };
    let mut session = Session::new(spec, VOCAB, outbox, &Shared::default()).unwrap();
    // Others' 20, then 30 of its own.
    session.set_cached(20);
    session.cached = 50;
    // Preempted; it finds what it had, and later ten more of others.
    session.set_cached(0);
    session.set_cached(50);
    session.set_cached(60);
    assert_eq!(session.stats.cached_prompt_tokens, 30);
}

/// Runs the forward that was planned already.
fn settle_planned(bench: &mut Bench) {
    bench.forget();
    let past = bench.session.cached();
    let mut logits = vec![0.0; bench.session.input().len() * VOCAB];
    for (row, &token) in bench.session.input().iter().enumerate() {
        logits[row * VOCAB + next(token, past + row) as usize] = 1.0;
    }
    bench.cache.extend(bench.session.input());
    let output = StepOutput {
        logits: logits.into(),
        ..StepOutput::default()
    };
    bench.session.settle(&output).unwrap();
}

#[test]
fn logits_that_mean_nothing_fail_the_session() {
    let mut bench = Bench::new(spec(10));
    bench.step();
    assert_eq!(bench.session.plan(bench.now), Plan::Run);
    let output = StepOutput {
        logits: vec![f32::NAN; VOCAB].into(),
        ..StepOutput::default()
    };
    assert!(bench.session.settle(&output).is_err());
}
