//! Sampling: from logits to tokens, for the draft and the target alike, and the rule that joins the two.
//!
//! [`Sampler`] turns a row of logits into a [`Distribution`] under [`SamplingParams`]; [`draft_token`] draws from it on
//! the draft side, [`check_draft`] and [`verify_round`] judge on the target side. Every random number is a pure function
//! of (seed, position, purpose), see [`CounterRng`], so that any worker can replay any decision.
//!
//! All arithmetic here is plain IEEE f32 and f64 without fused operations or library functions (but for the logarithms in
//! [`token_logprobs`] and [`kl_divergence`]), and wider vectors only take more of it at a time: equal inputs give equal bits on every
//! machine.

mod cutoff;
mod distribution;
mod divergence;
mod logprobs;
mod params;
mod race;
mod rng;
mod sampler;
mod softmax;
mod sparse;
mod speculative;
mod widest;

pub use distribution::Distribution;
pub use divergence::kl_divergence;
pub use logprobs::{TokenLogprobs, token_logprobs};
pub use params::{
    MAX_ADDITIVE_PENALTY, MAX_LOGIT_BIAS, MAX_LOGIT_BIAS_ENTRIES, MAX_LOGPROBS,
    MAX_REPETITION_PENALTY, MAX_TEMPERATURE, SamplingParams,
};
pub use rng::{CounterRng, Noise, Purpose};
pub use sampler::{History, Sampler};
pub(crate) use softmax::most_probable;
pub use sparse::{MAX_DRAFT_ENTRIES, SparseDistribution};
pub use speculative::{
    Candidate, DraftToken, Origin, RoundOutcome, check_draft, draft_token, verify_round,
};
