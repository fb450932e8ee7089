//! [`Scheduler`]: which sessions' forwards run next, and how many at once.
//!
//! Both workers run sessions that are state machines without a model ([`Session`]): they plan a forward and settle its
//! output. Each [`Scheduler::step`] makes one ragged batch of whatever is ready: a forward of every session that
//! generates, in turn, up to a bound on tokens, or one prompt chunk, as `PrefillShare` says. Nobody is waited for: what
//! arrives while a batch runs joins the next. What a session gets does not depend on its company, since forwards do not; before
//! and after a forward sessions work at the same time where that takes long ([`Crew`]).
//!
//! **KV blocks.** Sessions are kept by age. A session is *admitted* when all its tokens fit; from then on it holds blocks,
//! one more whenever it has grown by one. When blocks run out the youngest admitted session gives all of its back and
//! is processed again from its tokens once there is room. Only the oldest session that waits may be admitted, so the
//! admitted ones are always the oldest; a session is never opened that the whole pool could not hold; so the oldest always
//! goes on, and everyone becomes the oldest in the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use specattn_engine::{BlockPool, Crew, EngineError, Model, Sequence, StepOutput};
use specattn_proto::Fault;

use crate::clock;
use crate::gathering::{Gathering, Patience};
use crate::load::LoadGauge;
use crate::metrics::Forward;
use crate::prefill_share::PrefillShare;

mod session;

pub use session::{Plan, Session};

/// What bounds a step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens of generating sessions after which no more join a batch.
    pub batch_tokens: usize,
    /// Share of the time that prompts may take from sessions that generate, in `(0, 1)`.
    pub prefill_share: f64,
    /// Whether sessions take over what others have processed of a common beginning.
    pub share_prefixes: bool,
    /// For whom a batch waits: see [`crate::gathering`].
    pub gather: Patience,
    /// Added to every forward, for tests of slow models.
    pub forward_delay: Duration,
}

struct Slot<S> {
    session: S,
    sequence: Sequence,
}

/// Why a session left.
#[derive(Debug)]
pub enum Exit<E> {
    /// By itself.
    Ended(E),
    /// Nobody wanted it any more.
    Abandoned,
    /// It could not go on.
    Failed(Fault),
}

/// What a step came to.
#[derive(Debug)]
pub enum Stepped<S: Session> {
    /// Work was done; these sessions are gone, and their KV blocks free.
    Ran(Vec<(S, Exit<S::Ending>)>),
    /// Nobody has anything to do before then, or at all.
    Idle(Option<Instant>),
}

/// The model, the sessions and their KV caches.
#[derive(Debug)]
pub struct Scheduler<S> {
    model: Model,
    /// Who helps sessions prepare, and settle.
    preparing: Crew,
    settling: Crew,
    blocks: Arc<BlockPool>,
    load: Arc<LoadGauge>,
    limits: Limits,
    share: PrefillShare,
    gathering: Gathering,
    /// By age, the oldest first.
    slots: Vec<Slot<S>>,
    /// How many of them hold blocks.
    admitted: usize,
    /// The slot that generates first in the next batch, and the one that may prefill first.
    decode_turn: usize,
    prefill_turn: usize,
}

impl<S> std::fmt::Debug for Slot<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.sequence.fmt(f)
    }
}

impl<S: Session> Scheduler<S> {
    /// A scheduler without sessions.
    pub fn new(model: Model, load: Arc<LoadGauge>, limits: Limits) -> Self {
        Self {
            blocks: model.block_pool(),
            preparing: model.crew(),
            settling: model.crew(),
            model,
            load,
            limits,
            share: PrefillShare::new(limits.prefill_share),
            gathering: Gathering::new(limits.gather),
            slots: Vec::new(),
            admitted: 0,
            decode_turn: 0,
            prefill_turn: 0,
        }
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The first session for which `is_wanted` holds.
    pub fn find(&mut self, is_wanted: impl Fn(&S) -> bool) -> Option<&mut S> {
        let sessions = self.slots.iter_mut().map(|slot| &mut slot.session);
        sessions.into_iter().find(|session| is_wanted(session))
    }

    /// Takes up a session that may come to hold `max_tokens` positions.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when every slot is taken or the whole cache could not hold it,
    /// [`Fault::InvalidArgument`] when it is longer than the model's context.
    pub fn open(&mut self, session: S, max_tokens: usize) -> Result<(), Fault> {
        if self.slots.len() >= self.load.sessions_max() {
            return Err(Fault::exhausted("every session slot is taken"));
        }
        let sequence = self
            .model
            .empty_sequence(max_tokens)
            .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
        let most = sequence.cost(&[], max_tokens);
        if most > self.blocks.total() {
            let error = EngineError::KvExhausted {
                wanted: most,
                free: self.blocks.available(),
                total: self.blocks.total(),
            };
            return Err(Fault::exhausted(error.to_string()));
        }
        self.slots.push(Slot { session, sequence });
        self.load.set_sessions(self.slots.len());
        Ok(())
    }

    /// Takes the first session for which `is_wanted` holds out; its KV blocks are free then.
    pub fn remove(&mut self, is_wanted: impl Fn(&S) -> bool) -> Option<S> {
        let at = self.slots.iter().position(|slot| is_wanted(&slot.session));
        at.map(|at| self.take_out(at))
    }

    fn take_out(&mut self, at: usize) -> S {
        let Slot { session, sequence } = self.slots.remove(at);
        drop(sequence);
        self.admitted -= usize::from(at < self.admitted);
        self.decode_turn -= usize::from(at < self.decode_turn);
        self.prefill_turn -= usize::from(at < self.prefill_turn);
        self.load.set_sessions(self.slots.len());
        session
    }

    /// Runs one batch of what is ready.
    pub fn step(&mut self) -> Stepped<S> {
        let abandoned = self.sweep();
        if !abandoned.is_empty() {
            return Stepped::Ran(abandoned);
        }
        self.make_room();
        self.admit();
        self.find_prefixes();
        self.prepare();
        let mut wake = None;
        if !self.share.allows() || self.next_prompt().is_none() {
            let (batch, until) = match self.hold() {
                Some(until) => (Vec::new(), Some(until)),
                None => self.plan_batch(),
            };
            if !batch.is_empty() {
                let start = clock::now();
                let gone = self.run(&batch);
                let time = clock::now() - start;
                self.share.decoded(time);
                self.gathering.ran(time);
                return Stepped::Ran(gone);
            }
            wake = until;
        }
        let Some(at) = self.next_prompt() else {
            return Stepped::Idle(wake);
        };
        self.prefill_turn = at + 1;
        self.slots[at].session.plan(clock::now());
        let start = clock::now();
        let gone = self.run(&[at]);
        if self.slots[..self.admitted]
            .iter()
            .all(|slot| slot.session.is_prefilling())
        {
            self.share.nobody_decodes();
        } else {
            self.share.prefilled(clock::now() - start);
        }
        Stepped::Ran(gone)
    }

    /// Takes out what nobody wants any more.
    pub fn sweep(&mut self) -> Vec<(S, Exit<S::Ending>)> {
        let mut gone = Vec::new();
        for at in (0..self.slots.len()).rev() {
            if self.slots[at].session.is_abandoned() {
                gone.push((self.take_out(at), Exit::Abandoned));
            }
        }
        gone
    }

    /// Gives every admitted session the blocks of its next forward, the oldest first; the youngest ones give theirs back
    /// where there are not enough.
    fn make_room(&mut self) {
        let mut at = 0;
        while at < self.admitted {
            let Slot { session, sequence } = &mut self.slots[at];
            if sequence.reserve(session.reach()).is_ok() {
                at += 1;
                continue;
            }
            self.admitted -= 1;
            let Slot { session, sequence } = &mut self.slots[self.admitted];
            tracing::debug!(
                tokens = sequence.len(),
                "session preempted: KV blocks ran out"
            );
            sequence.clear();
            session.set_cached(0);
            self.load.count_preemption();
        }
    }

    /// Admits waiting sessions, in order, while there are blocks for all their tokens and one more for everybody.
    fn admit(&mut self) {
        while self.admitted < self.slots.len() {
            let Slot { session, sequence } = &mut self.slots[self.admitted];
            let headroom = self.admitted;
            let cost = sequence.cost(session.prompt(), session.reach());
            if self.admitted > 0 && cost + headroom > self.blocks.available() {
                return;
            }
            take_over(&mut self.model, sequence, session);
            if sequence.reserve(session.reach()).is_err() {
                // Chunks that nobody used were counted as free, and are its own now.
                sequence.clear();
                session.set_cached(0);
                return;
            }
            self.admitted += 1;
        }
    }

    /// Gives prompts what others have processed meanwhile.
    fn find_prefixes(&mut self) {
        for Slot { session, sequence } in &mut self.slots[..self.admitted] {
            sequence.truncate(session.cached());
            if sequence.len() < session.cached() {
                session.set_cached(sequence.len());
            }
            take_over(&mut self.model, sequence, session);
        }
    }

    /// Lets sessions that generate take in what has arrived, which needs no turn.
    fn prepare(&mut self) {
        let sessions = self.slots[..self.admitted].iter_mut();
        let mut arrived: Vec<&mut S> = sessions
            .map(|slot| &mut slot.session)
            .filter(|session| !session.is_prefilling() && session.has_arrivals())
            .collect();
        self.preparing
            .for_each(&mut arrived, |session| session.prepare());
    }

    /// The slot that is to process a chunk of its prompt next.
    fn next_prompt(&self) -> Option<usize> {
        let turn = self.prefill_turn;
        (0..self.admitted)
            .filter(|&at| self.slots[at].session.is_prefilling())
            .min_by_key(|&at| (at < turn, at))
    }

    /// Until when the next batch waits for sessions to join it.
    fn hold(&mut self) -> Option<Instant> {
        let now = clock::now();
        let sessions = self.slots[..self.admitted].iter().map(|slot| &slot.session);
        let generating = sessions.filter(|session| !session.is_prefilling());
        let readiness = generating.map(|session| session.readiness(now));
        self.gathering.until(now, readiness)
    }

    /// Plans a batch of sessions that generate: their slots in ascending order; without any, when to look again.
    fn plan_batch(&mut self) -> (Vec<usize>, Option<Instant>) {
        let now = clock::now();
        let mut wake: Option<Instant> = None;
        let (mut batch, mut tokens) = (Vec::new(), 0);
        for offset in 0..self.admitted {
            let at = (self.decode_turn + offset) % self.admitted;
            let Slot { session, sequence } = &mut self.slots[at];
            if session.is_prefilling() {
                continue;
            }
            match session.plan(now) {
                Plan::Run => {
                    batch.push(at);
                    tokens += session.step(sequence).tokens.len();
                    if tokens >= self.limits.batch_tokens {
                        self.decode_turn = at + 1;
                        break;
                    }
                }
                Plan::Wait(until) => {
                    wake = match (wake, until) {
                        (Some(wake), Some(until)) => Some(wake.min(until)),
                        (wake, until) => wake.or(until),
                    };
                }
            }
        }
        batch.sort_unstable();
        (batch, wake)
    }

    /// Runs the planned forwards of the slots `batch`, ascending; gives the sessions that are gone.
    fn run(&mut self, batch: &[usize]) -> Vec<(S, Exit<S::Ending>)> {
        // A prompt chunk runs alone.
        let is_prompt = self.slots[batch[0]].session.is_prefilling();
        let mut tokens = 0;
        let mut steps = Vec::with_capacity(batch.len());
        let mut chosen = batch.iter().peekable();
        for (at, Slot { session, sequence }) in self.slots.iter_mut().enumerate() {
            if chosen.next_if_eq(&&at).is_none() {
                continue;
            }
            sequence.truncate(session.cached());
            let step = session.step(sequence);
            tokens += step.tokens.len();
            steps.push(step);
        }
        let start = clock::now();
        let outputs = self.model.forward(&mut steps);
        drop(steps);
        if !self.limits.forward_delay.is_zero() {
            std::thread::sleep(self.limits.forward_delay);
        }
        let (time, sessions) = (clock::now() - start, batch.len());
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        tracing::trace!(us, sessions, tokens, is_prompt, "forward");
        self.load.add_forward(&Forward {
            time,
            sessions,
            tokens,
            is_prompt,
        });
        let mut gone = Vec::new();
        let settled = self.settle(batch, &outputs);
        // From the last on, so that those before keep their places.
        for (&at, settled) in batch.iter().zip(settled).rev() {
            let Slot { session, sequence } = &mut self.slots[at];
            let exit = match settled {
                Ok(None) => {
                    if self.limits.share_prefixes
                        && let Err(error) = self.model.publish(sequence, session.prompt())
                    {
                        tracing::warn!(%error, "a prompt's end is not shared");
                    }
                    continue;
                }
                Ok(Some(ending)) => Exit::Ended(ending),
                Err(fault) => Exit::Failed(fault),
            };
            gone.push((self.take_out(at), exit));
        }
        gone
    }

    /// Gives the sessions in the slots `batch`, ascending, their outputs; how each one took it.
    fn settle(
        &mut self,
        batch: &[usize],
        outputs: &Result<Vec<StepOutput>, EngineError>,
    ) -> Vec<Settled<S::Ending>> {
        let outputs = match outputs {
            Ok(outputs) => outputs,
            Err(error) => {
                let failed = || Err(Fault::Internal(error.to_string()));
                return batch.iter().map(|_| failed()).collect();
            }
        };
        let mut chosen = batch.iter().peekable();
        let slots = self.slots.iter_mut().enumerate();
        let sessions = slots.filter(|(at, _)| chosen.next_if_eq(&at).is_some());
        let mut settling: Vec<_> = sessions
            .zip(outputs)
            .map(|((_, slot), output)| (&mut slot.session, output, Ok(None)))
            .collect();
        self.settling
            .for_each(&mut settling, |(session, output, settled)| {
                *settled = session.settle(output);
            });
        settling.into_iter().map(|(.., settled)| settled).collect()
    }
}

/// How a session took its forward's output: how it ended, if it did.
type Settled<E> = Result<Option<E>, Fault>;

/// Gives a session what others have processed of its prompt behind what it has.
fn take_over<S: Session>(model: &mut Model, sequence: &mut Sequence, session: &mut S) {
    if let Err(error) = model.adopt(sequence, session.prompt()) {
        // It goes on from what it has; a device that is lost will fail its next forward.
        tracing::warn!(%error, "a prompt's end could not be taken over");
    }
    if sequence.len() > session.cached() {
        session.set_cached(sequence.len());
    }
}
