//! What a request asks for: mode, sampling, stopping, speculation.

use clap::{Args, ValueEnum};
use specattn_proto::v1;

/// How the target attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Full attention: exactly the target's distribution
    Dense,
    /// Attention masked by the draft's selections: approximate
    Sparse,
    /// Masked attention, confirmed by dense passes: exactly the target's distribution
    Exact,
}

impl Mode {
    /// A mode as it travels.
    pub fn of(mode: v1::Mode) -> Option<Self> {
        match mode {
            v1::Mode::Dense => Some(Self::Dense),
            v1::Mode::Sparse => Some(Self::Sparse),
            v1::Mode::Exact => Some(Self::Exact),
            v1::Mode::Unspecified => None,
        }
    }

    /// Its name on the command line and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Sparse => "sparse",
            Self::Exact => "exact",
        }
    }
}

/// How tokens are sampled.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 always takes the most probable token; small models then fall into loops, and 0.8 reads better
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub temperature: f32,

    /// Keep the K most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: u32,

    /// Keep the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,

    /// Drop tokens less probable than this times the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,

    /// Divide positive and multiply negative logits of tokens already in prompt or output
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    pub repetition_penalty: f32,

    /// Subtract this from the logits of tokens already in the output
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,

    /// Subtract this from a token's logit once per occurrence in the output
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,

    /// Key of the random choices; with a draft worker its timing also plays a part [default: a random seed, shown by --json]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

/// Where generation stops, besides --max-tokens.
#[derive(Debug, Args)]
#[command(next_help_heading = "Stopping")]
pub struct StopArgs {
    /// Stop before this text appears; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,

    /// Stop after this token id; may be repeated
    #[arg(long, value_name = "ID")]
    pub stop_token: Vec<u32>,

    /// Go on past the model's own end-of-text tokens
    #[arg(long)]
    pub ignore_eos: bool,

    /// Stop after this many milliseconds and keep what there is
    #[arg(long, value_name = "MS")]
    pub deadline_ms: Option<u64>,
}

/// How the draft works. What is left out is up to the gateway.
#[derive(Debug, Args)]
#[command(next_help_heading = "Draft and masks")]
pub struct SpeculationArgs {
    /// Tokens the draft proposes per round, 0 to 16; 0 leaves the target alone [default: the gateway's, usually 4, and in
    /// dense mode only while rounds measure faster than steps alone]
    #[arg(long, value_name = "G")]
    pub draft_length: Option<u32>,

    /// Let the target decode alone: the same as --draft-length 0
    #[arg(long, conflicts_with_all = ["draft_length", "draft"])]
    pub no_draft: bool,

    /// Capture the draft's attention at least every N draft steps, which then read all of its KV cache and renew masks; the
    /// others read what the draft itself last found heavy [default: the draft worker's, usually 4]
    #[arg(long, value_name = "N")]
    pub capture_every: Option<u32>,

    /// Attention mass that the draft's own reads must keep, in (0, 1] [default: the draft worker's, usually 0.8]
    #[arg(long, value_name = "P")]
    pub own_p: Option<f32>,

    /// Attention mass that the masks must keep, in (0, 1] [default: the gateway's, usually 0.95; chosen online in exact
    /// mode]
    #[arg(long, value_name = "P")]
    pub mask_p: Option<f32>,

    /// First positions that masks always keep [default: the gateway's, usually 4]
    #[arg(long, value_name = "N")]
    pub sink: Option<u32>,

    /// Last positions that masks always keep [default: the gateway's, usually 64]
    #[arg(long, value_name = "N")]
    pub window: Option<u32>,

    /// Keep whole groups of this many positions [default: the gateway's, usually 1]
    #[arg(long, value_name = "G")]
    pub granularity: Option<u32>,

    /// Exact mode: confirm this many tokens at a time, 1 to 64 [default: chosen online]
    #[arg(long, value_name = "N")]
    pub confirm_length: Option<u32>,

    /// Sparse mode: refresh KV entries by a dense pass every N tokens, 1 to 64 [default: never; 64 with --max-kl]
    #[arg(long, value_name = "N")]
    pub refresh_every: Option<u32>,

    /// Sparse mode: keep the mean divergence from dense under X nats per token by adapting --mask-p
    #[arg(long, value_name = "X")]
    pub max_kl: Option<f32>,
}
