//! What a session is told, and what it sends: the proto messages, checked.

use specattn_engine::sampling::{DraftToken, SamplingParams};
use specattn_engine::{KvReads, ModelConfig};
use specattn_mask::{MaskPolicy, Source};

use crate::args::Drafting;
use crate::outgoing::OutgoingMask;

/// What a gateway asks for, checked.
#[derive(Debug)]
pub(crate) struct SessionSpec {
    /// Tokens so far, at least one.
    pub(crate) tokens: Vec<u32>,
    /// Tokens at which the session ends.
    pub(crate) limit: usize,
    /// Positions the KV cache may hold.
    pub(crate) capacity: usize,
    /// Most draft tokens per round, at least 1.
    pub(crate) draft_length: usize,
    pub(crate) drafting: Drafting,
}

/// What a session must know of the draft model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DraftShape {
    pub(crate) vocab_size: usize,
    pub(crate) num_layers: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
}

impl From<&ModelConfig> for DraftShape {
    fn from(config: &ModelConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
        }
    }
}

/// What the verify worker says of the session, checked.
#[derive(Debug)]
pub(crate) struct Welcome {
    pub(crate) epoch: u64,
    /// Committed tokens after those of the spec.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    /// Most draft tokens per round, at least 1.
    pub(crate) draft_length: usize,
    /// Rounds may be shorter where that is faster.
    pub(crate) may_shorten: bool,
    pub(crate) sampling: SamplingParams,
    pub(crate) policy: MaskPolicy,
    /// Attention sources to select by; none: no masks are wanted.
    pub(crate) sources: Vec<Source>,
}

/// What the verify worker answers; see the .proto file's `Verdict`.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) epoch: u64,
    pub(crate) base: u64,
    pub(crate) accepted: usize,
    pub(crate) next_tokens: Vec<u32>,
    pub(crate) judged: bool,
    pub(crate) need_full_mask: bool,
    /// The mass that masks must reach from now on.
    pub(crate) mask_p: Option<f32>,
}

/// A message of a round's proposal: most rounds are one message.
#[derive(Debug, PartialEq)]
pub(crate) struct Proposal {
    pub(crate) epoch: u64,
    pub(crate) base: usize,
    pub(crate) sequence: u64,
    pub(crate) pending_token: u32,
    /// Draft tokens of the round sent before.
    pub(crate) offset: usize,
    pub(crate) draft: Vec<DraftToken>,
    pub(crate) mask: Option<OutgoingMask>,
    /// No more of the round follows.
    pub(crate) last: bool,
    /// For what the session may come to, which way, if not as it stands.
    pub(crate) ahead: Option<Ahead>,
    /// What the draft read since its message before.
    pub(crate) kv: KvReads,
}

/// How a round stands that is for one of several things that may come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// The last tokens before its base, which the draft was not told.
    pub(crate) assumed: Vec<u32>,
    /// The target need not wait for a round.
    pub(crate) unawaited: bool,
}
