//! [`LoadGauge`]: what a worker is doing, readable from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use specattn_engine::BlockPool;
use specattn_proto::v1::WorkerLoad;

use crate::metrics::{Forward, Forwards};

/// Counters that the engine thread keeps and the edge reports.
#[derive(Debug)]
pub struct LoadGauge {
    blocks: Arc<BlockPool>,
    sessions_max: u32,
    sessions_active: AtomicU32,
    tokens_total: AtomicU64,
    forwards_total: AtomicU64,
    busy_us_total: AtomicU64,
    preemptions_total: AtomicU64,
    forwards: Forwards,
}

impl LoadGauge {
    /// A gauge for a worker with these KV blocks that takes up to `sessions_max` sessions.
    pub fn new(blocks: Arc<BlockPool>, sessions_max: u32) -> Self {
        Self {
            blocks,
            sessions_max,
            sessions_active: AtomicU32::new(0),
            tokens_total: AtomicU64::new(0),
            forwards_total: AtomicU64::new(0),
            busy_us_total: AtomicU64::new(0),
            preemptions_total: AtomicU64::new(0),
            forwards: Forwards::default(),
        }
    }

    /// Most sessions at a time.
    pub fn sessions_max(&self) -> usize {
        self.sessions_max as usize
    }

    /// Says how many sessions there are now.
    pub fn set_sessions(&self, sessions: usize) {
        let sessions = u32::try_from(sessions).unwrap_or(u32::MAX);
        self.sessions_active.store(sessions, Ordering::Relaxed);
    }

    /// Counts a forward.
    pub fn add_forward(&self, forward: &Forward) {
        let us = u64::try_from(forward.time.as_micros()).unwrap_or(u64::MAX);
        self.forwards_total.fetch_add(1, Ordering::Relaxed);
        let tokens = forward.tokens as u64;
        self.tokens_total.fetch_add(tokens, Ordering::Relaxed);
        self.busy_us_total.fetch_add(us, Ordering::Relaxed);
        self.forwards.observe(forward);
    }

    /// Counts a session whose KV blocks were taken away.
    pub fn count_preemption(&self) {
        self.preemptions_total.fetch_add(1, Ordering::Relaxed);
    }

    /// How forwards went.
    pub(crate) fn forwards(&self) -> &Forwards {
        &self.forwards
    }

    /// The report for gateways and status calls.
    pub fn report(&self, draining: bool) -> WorkerLoad {
        let sharing = self.blocks.sharing();
        WorkerLoad {
            sessions_active: self.sessions_active.load(Ordering::Relaxed),
            sessions_max: self.sessions_max,
            kv_blocks_total: self.blocks.total() as u64,
            kv_blocks_used: self.blocks.used() as u64,
            tokens_total: self.tokens_total.load(Ordering::Relaxed),
            draining,
            kv_blocks_cached: self.blocks.cached() as u64,
            prefix_tokens_total: sharing.adopted_tokens,
            kv_blocks_evicted_total: sharing.evicted_blocks,
            preemptions_total: self.preemptions_total.load(Ordering::Relaxed),
            forwards_total: self.forwards_total.load(Ordering::Relaxed),
            busy_us_total: self.busy_us_total.load(Ordering::Relaxed),
        }
    }
}
