//! Limits on what crosses the wire. Every service keeps the same ones; `.proto` comments quote them.
//!
//! They bound memory before a model's own limits (context, vocabulary) are consulted.

use std::time::Duration;

/// Longest session in tokens, prompt and completion, whatever the model says.
pub const MAX_SESSION_TOKENS: usize = 1 << 18;

/// Most bytes of prompt text: a session's tokens at eight bytes each.
pub const MAX_PROMPT_BYTES: usize = 8 * MAX_SESSION_TOKENS;

/// Largest message that carries a whole session: prompt text, or its token ids at five bytes each at most, and room
/// for every other bounded field.
pub const MAX_SESSION_MESSAGE_BYTES: usize = 4 << 20;

/// Largest message that carries no token list of a whole session: events, deltas, verdicts, heartbeats.
pub const MAX_SMALL_MESSAGE_BYTES: usize = 1 << 20;

/// Most encoded mask bytes of a round.
pub const MAX_MASK_BYTES: usize = 1 << 20;

/// Most devices that a worker names.
pub const MAX_DEVICES: usize = 64;

/// Most draft tokens in a round.
pub const MAX_DRAFT_LENGTH: u32 = 16;

/// Tokens that a proposal made ahead may assume: two rounds and what follows them, and to spare.
pub const MAX_ASSUMED_TOKENS: usize = 64;

/// Entries of draft tokens' distributions that a session's proposals made ahead may hold together.
pub const MAX_ENTRIES_AHEAD: usize = 1 << 17;

/// Most tokens between two dense passes that check masked ones: a session holds a distribution for each.
pub const MAX_CHECK_LENGTH: u32 = 64;

/// Highest bound on the divergence of sparse from dense, in nats per token.
pub const MAX_KL: f32 = 10.0;

/// Most entries of a draft token's distribution q.
pub const MAX_Q_ENTRIES: usize = 1_024;

/// Most attention sources in use in a session.
pub const MAX_SOURCES: usize = 256;

/// Most terms of one attention source.
pub const MAX_SOURCE_TERMS: usize = 4_096;

/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 16;

/// Longest stop string in bytes.
pub const MAX_STOP_STRING_BYTES: usize = 1_024;

/// Most stop tokens of a request.
pub const MAX_STOP_TOKENS: usize = 256;

/// Most logit bias entries of a request.
pub const MAX_LOGIT_BIAS_ENTRIES: usize = 1_024;

/// Most alternatives reported beside a committed token.
pub const MAX_LOGPROBS: u32 = 20;

/// Most positions in a mask's sink, and in its window.
pub const MAX_MASK_EDGE_TOKENS: u32 = 65_536;

/// Coarsest mask granularity.
pub const MAX_MASK_GRANULARITY: u32 = 256;

/// Longest deadline of a request.
pub const MAX_DEADLINE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Longest model name, endpoint or hash in bytes.
pub const MAX_NAME_BYTES: usize = 1_024;

/// Most end-of-text tokens a model may declare.
pub const MAX_EOS_TOKENS: usize = 64;
