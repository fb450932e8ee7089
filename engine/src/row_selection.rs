//! [`RowSelection`]: top-p selections of mixed attention rows, made where the rows are.
//!
//! A draft step's attention rows are wanted for two things only: to be mixed and to have their heaviest entries named. On a
//! GPU the rows, megabytes per step, need never leave it; a few bits per position do. Rows of means, which gather a round's
//! captured steps before they are selected from, stay there from step to step.

use std::sync::atomic::{AtomicU64, Ordering};

/// A row to select from: a fixed mixture of the query heads' attention rows of a step's last token.
#[derive(Debug, Clone, PartialEq)]
pub struct MixedRow {
    /// The heads that take part; their weights sum to 1.
    pub terms: Vec<MixedHead>,
    /// Share of the row's mass that the selection must reach, in (0, 1].
    pub p: f32,
    /// `Some`: select from the mean of the round's captured steps so far, spread over neighbours. `None`: from this step's row.
    pub spread: Option<Spread>,
}

/// How a mean's entries count for their neighbours: `row[i] = Σ share^|d| · mean[i + d]` over `|d| <= reach`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// In [0, 1).
    pub share: f32,
    /// At most 16.
    pub reach: u32,
}

/// Most that [`Spread::reach`] may be.
pub(crate) const MAX_REACH: u32 = 16;

/// Whose means a selection's are: they stay on the device between the captured steps of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RoundId(u64);

impl RoundId {
    /// One that no other selection of this process has.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl Default for RoundId {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a captured step stands in its round; for rows of means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Whose means these are.
    pub id: RoundId,
    /// Captured steps of the round before this one; 0 begins anew.
    pub step: u32,
    /// The first so many positions count; at most the step's own positions and those before.
    pub context_len: usize,
}

/// A head's share of a [`MixedRow`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MixedHead {
    /// Layer.
    pub layer: u32,
    /// Query head within the layer.
    pub head: u32,
    /// Its share: finite and not negative.
    pub weight: f32,
}

/// What to select from in one step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowSelection {
    /// The rows, at least one.
    pub rows: Vec<MixedRow>,
    /// The round that rows of means gather over.
    pub round: Round,
}

/// The selections of one step: for each row the entries at or above the largest threshold whose mass reaches the row's p.
/// Masses are fixed-point, in units of 2^-31, so that sums have no order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SelectedRows {
    /// Positions per row: the sequence's length after the step.
    pub kv_len: usize,
    /// `[rows, words_per_row]`: bit i of word w is position 64 w + i.
    pub words: Vec<u64>,
}

impl SelectedRows {
    /// Words of a row.
    pub fn words_per_row(&self) -> usize {
        self.kv_len.div_ceil(64)
    }

    /// Row number `row`.
    ///
    /// # Panics
    /// When there is no such row.
    pub fn row(&self, row: usize) -> &[u64] {
        let words = self.words_per_row();
        &self.words[row * words..][..words]
    }
}
