//! Engine and mask types to and from the wire's, where both workers need them.

use specattn_engine::sampling::SamplingParams;
use specattn_mask::MaskPolicy;
use specattn_proto::validate::{CheckedMaskPolicy, CheckedSampling};

/// The engine's sampling rule; an absent seed, which only greedy sessions may have, is 0.
pub fn sampling_params(checked: CheckedSampling) -> SamplingParams {
    SamplingParams {
        temperature: checked.temperature,
        top_k: checked.top_k,
        top_p: checked.top_p,
        min_p: checked.min_p,
        repetition_penalty: checked.repetition_penalty,
        presence_penalty: checked.presence_penalty,
        frequency_penalty: checked.frequency_penalty,
        seed: checked.seed.unwrap_or(0),
        logit_bias: checked.logit_bias,
        logprobs: checked.logprobs,
    }
}

/// The sampling rule for the wire, with `seed` in place of its own.
pub fn checked_sampling(params: &SamplingParams, seed: u64) -> CheckedSampling {
    CheckedSampling {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        repetition_penalty: params.repetition_penalty,
        presence_penalty: params.presence_penalty,
        frequency_penalty: params.frequency_penalty,
        seed: Some(seed),
        logit_bias: params.logit_bias.clone(),
        logprobs: params.logprobs,
    }
}

/// The mask crate's policy.
pub fn mask_policy(checked: CheckedMaskPolicy) -> MaskPolicy {
    MaskPolicy {
        p: checked.mask_p,
        sink_tokens: checked.sink_tokens,
        window_tokens: checked.window_tokens,
        granularity: checked.granularity,
    }
}

/// The mask policy for the wire.
pub fn checked_mask_policy(policy: &MaskPolicy) -> CheckedMaskPolicy {
    CheckedMaskPolicy {
        mask_p: policy.p,
        sink_tokens: policy.sink_tokens,
        window_tokens: policy.window_tokens,
        granularity: policy.granularity,
    }
}
