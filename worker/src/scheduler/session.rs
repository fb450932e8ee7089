//! [`Session`]: what a session says to the scheduler, and does for it.

use std::time::Instant;

use specattn_engine::{Sequence, Step, StepOutput};
use specattn_proto::Fault;

use crate::gathering::Readiness;

/// What a session wants to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Run the forward of [`Session::step`].
    Run,
    /// Nothing until then or, without a time, until a message comes.
    Wait(Option<Instant>),
}

/// A session as the scheduler sees it.
pub trait Session: Send {
    /// How a session ends by itself.
    type Ending: Send;

    /// Whether nobody wants it any more.
    fn is_abandoned(&self) -> bool;
    /// Positions that must have blocks: all tokens so far, and those that its next forward may add at most.
    fn reach(&self) -> usize;
    /// Whether its next forward is a chunk of its prompt, or of tokens that are processed again: it plans that without
    /// waiting for anything.
    fn is_prefilling(&self) -> bool;
    /// The tokens that may be shared: each whole chunk of [`specattn_engine::CHUNK_TOKENS`], counted from the first, and what is left behind
    /// them is processed by a dense forward of its own.
    fn prompt(&self) -> &[u32];
    /// Positions the KV cache must hold before the planned forward; more are to be forgotten.
    fn cached(&self) -> usize;
    /// The KV cache holds `cached` positions now: others had processed them, or it was given up (0).
    fn set_cached(&mut self, cached: usize);
    /// Whether something has arrived that takes long to take in; asked of sessions that generate.
    fn has_arrivals(&self) -> bool {
        false
    }
    /// Takes it in, ahead of the next plan. Sessions do it at the same time.
    fn prepare(&mut self) {}
    /// Says what to do now. A planned forward is run, or the session is gone.
    fn plan(&mut self, now: Instant) -> Plan;
    /// The planned forward: its tokens follow the positions in `sequence`, those that the session says are cached.
    fn step<'a>(&'a self, sequence: &'a mut Sequence) -> Step<'a>;
    /// How it stands to a batch that may wait; asked of sessions that generate.
    fn readiness(&self, _now: Instant) -> Readiness {
        Readiness::Alone
    }

    /// Takes the output of the planned forward. Says how the session ended, if it did. Sessions of a batch do it at the same time.
    ///
    /// # Errors
    /// The session cannot go on.
    fn settle(&mut self, output: &StepOutput) -> Result<Option<Self::Ending>, Fault>;
}
