//! [`Figures`]: sums over the rounds of one setting, and what follows from them.

use specattn_engine::KvReads;

/// Sums over rounds.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Rounds run.
    pub rounds: u64,
    /// Tokens that a round is expected to commit, summed: 1 + Σ of the products of the overlaps Σ min(p, q) so far.
    pub expected_tokens: f64,
    /// What the draft read.
    pub draft: KvReads,
    /// One for each mask policy.
    pub masks: Vec<MaskFigures>,
}

/// Of one mask policy.
#[derive(Debug, Clone, Default)]
pub struct MaskFigures {
    /// What masked target forwards would have read.
    pub target: KvReads,
    /// KL(dense ‖ masked) in nats, summed over the rows that a round used.
    pub divergence: f64,
    /// Rows whose most probable token the mask did not change.
    pub agreed: u64,
    /// Rows.
    pub rows: u64,
    /// Encoded mask bytes.
    pub bytes: u64,
}

impl Figures {
    /// Empty sums for `masks` mask policies.
    pub fn new(masks: usize) -> Self {
        Self {
            masks: vec![MaskFigures::default(); masks],
            ..Self::default()
        }
    }

    /// Adds another run's sums.
    pub fn add(&mut self, other: &Self) {
        self.rounds += other.rounds;
        self.expected_tokens += other.expected_tokens;
        self.draft += other.draft;
        for (mask, other) in self.masks.iter_mut().zip(&other.masks) {
            mask.target += other.target;
            mask.divergence += other.divergence;
            mask.agreed += other.agreed;
            mask.rows += other.rows;
            mask.bytes += other.bytes;
        }
    }

    /// Expected tokens per target forward.
    pub fn tokens_per_forward(&self) -> f64 {
        self.expected_tokens / self.rounds as f64
    }

    /// Share of the draft's KV entries that it read.
    pub fn draft_kept(&self) -> f64 {
        kept(self.draft)
    }

    /// KV bytes that draft and target read per committed token under mask policy `mask` (`None`: dense attention), when an
    /// entry of either has `entry_bytes` (draft, target).
    pub fn system_bytes_per_token(&self, mask: Option<usize>, entry_bytes: (u64, u64)) -> f64 {
        let target = match mask {
            Some(mask) => self.masks[mask].target.read,
            None => self.masks[0].target.dense,
        };
        let bytes = self.draft.read * entry_bytes.0 + target * entry_bytes.1;
        bytes as f64 / self.expected_tokens
    }
}

impl MaskFigures {
    /// Share of the target's KV entries that masked forwards read.
    pub fn kept(&self) -> f64 {
        kept(self.target)
    }

    /// Mean KL(dense ‖ masked), nats.
    pub fn mean_divergence(&self) -> f64 {
        self.divergence / self.rows as f64
    }

    /// Share of rows with the same most probable token.
    pub fn agreement(&self) -> f64 {
        self.agreed as f64 / self.rows as f64
    }
}

fn kept(reads: KvReads) -> f64 {
    reads.read as f64 / reads.dense as f64
}
