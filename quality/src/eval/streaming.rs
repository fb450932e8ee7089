//! StreamingLLM (Xiao et al. 2024): the first positions and a sliding window, the same for every head.

use specattn_engine::HeadLists;
use specattn_mask::PositionSet;

use crate::error::QualityError;
use crate::eval::method::{Choice, Masker};

/// Sinks and a window that together are a share of the context.
#[derive(Debug)]
pub struct Streaming {
    sink_tokens: usize,
    /// Share of the cached positions that is read.
    budget: f64,
    lists: HeadLists,
}

impl Streaming {
    /// For a target of `heads` KV heads over all layers.
    pub fn new(sink_tokens: usize, budget: f64, heads: usize) -> Self {
        Self {
            sink_tokens,
            budget,
            lists: HeadLists {
                lists: vec![PositionSet::default()],
                of_head: vec![0; heads],
            },
        }
    }
}

impl Masker for Streaming {
    fn choose(&mut self, base: usize) -> Result<Choice<'_>, QualityError> {
        let cached = base - 1;
        let sinks = self.sink_tokens.min(cached);
        let window = ((cached as f64 * self.budget) as usize).saturating_sub(sinks);
        let from = cached.saturating_sub(window).max(sinks);
        let list = &mut self.lists.lists[0];
        list.clear();
        list.resize(cached);
        list.insert_range(0, sinks);
        list.insert_range(from, cached);
        Ok(Choice::Lists(&self.lists))
    }
}
