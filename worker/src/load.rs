//! [`LoadGauge`]: what a worker is doing, readable from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use specattn_engine::BlockPool;
use specattn_proto::v1::WorkerLoad;

/// Counters that the engine thread keeps and the edge reports.
#[derive(Debug)]
pub struct LoadGauge {
    blocks: Arc<BlockPool>,
    sessions_max: u32,
    sessions_active: AtomicU32,
    tokens_total: AtomicU64,
}

impl LoadGauge {
    /// A gauge for a worker with these KV blocks that takes up to `sessions_max` sessions.
    pub fn new(blocks: Arc<BlockPool>, sessions_max: u32) -> Self {
        Self {
            blocks,
            sessions_max,
            sessions_active: AtomicU32::new(0),
            tokens_total: AtomicU64::new(0),
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

    /// Counts tokens that went through the model.
    pub fn add_tokens(&self, tokens: usize) {
        self.tokens_total
            .fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// The report for gateways and status calls.
    pub fn report(&self, draining: bool) -> WorkerLoad {
        WorkerLoad {
            sessions_active: self.sessions_active.load(Ordering::Relaxed),
            sessions_max: self.sessions_max,
            kv_blocks_total: self.blocks.total() as u64,
            kv_blocks_used: self.blocks.used() as u64,
            tokens_total: self.tokens_total.load(Ordering::Relaxed),
            draining,
        }
    }
}
