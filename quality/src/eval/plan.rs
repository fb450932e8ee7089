//! [`Method`]: what is compared, at which settings, and [`measure`]: all of it over one window.

use std::fmt;
use std::sync::Arc;

use specattn_draft::OwnPolicy;
use specattn_engine::{LogitRows, Model, Step};
use specattn_mask::{LayerMap, MaskPolicy};

use crate::error::QualityError;
use crate::eval::chosen::{ByKeys, Oracle, Quest};
use crate::eval::dense::Reference;
use crate::eval::figures::Figures;
use crate::eval::h2o::{HeavyHitters, PromptSums};
use crate::eval::method::{Choice, Masker};
use crate::eval::rounds::{Window, run};
use crate::eval::served::Served;
use crate::eval::streaming::Streaming;

/// Every so many prompt positions one's attention counts for H2O's sums over the prompt.
const PROMPT_STRIDE: usize = 8;

/// Ways to choose what the target reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Everything.
    Dense,
    /// The layer map in force, as served.
    Ours,
    /// One draft layer per target layer and no memory, as in the paper.
    Paper,
    /// Sinks and a window.
    StreamingLlm,
    /// Heavy hitters.
    H2o,
    /// Pages by bounds on their keys.
    Quest,
    /// The target's own top-p.
    Oracle,
}

impl Method {
    /// All of them, in the order of the tables.
    pub const ALL: [Self; 7] = [
        Self::Dense,
        Self::Ours,
        Self::Paper,
        Self::StreamingLlm,
        Self::H2o,
        Self::Quest,
        Self::Oracle,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Ours => "SpecAttn, this map",
            Self::Paper => "SpecAttn, the paper's layer map",
            Self::StreamingLlm => "StreamingLLM",
            Self::H2o => "H2O",
            Self::Quest => "Quest",
            Self::Oracle => "oracle top-p",
        }
    }

    /// Whether its setting is p, the mass to reach; else it is the share of the context to read.
    pub fn is_by_mass(self) -> bool {
        matches!(self, Self::Ours | Self::Paper | Self::Oracle)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One method at one setting: p, or a share of the context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Setting {
    /// The method.
    pub method: Method,
    /// Its p or its share; 1 for dense.
    pub value: f32,
}

/// What every measurement shares.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to compare.
    pub settings: Vec<Setting>,
    /// The map of [`Method::Ours`].
    pub map: Arc<LayerMap>,
    /// The map of [`Method::Paper`].
    pub paper_map: Arc<LayerMap>,
    /// Sinks, window and granularity; p is the setting's.
    pub policy: MaskPolicy,
    /// What the draft of [`Method::Ours`] reads; the paper's reads everything.
    pub own: OwnPolicy,
}

struct Everything;

impl Masker for Everything {
    fn start(&mut self, _tokens: &[u32], _cached: usize) -> Result<(), QualityError> {
        Ok(())
    }

    fn choose(
        &mut self,
        _tokens: &[u32],
        _base: usize,
        _draft: usize,
    ) -> Result<Choice<'_>, QualityError> {
        Ok(Choice::Dense)
    }
}

/// Runs every setting of `plan` over `window`; one [`Figures`] each. `progress` hears (done, in all), in rounds' tokens.
///
/// # Errors
/// [`QualityError`] when a model or a mask fails.
pub fn measure(
    target: &mut Model,
    draft: &mut Model,
    window: &Window<'_>,
    plan: &Plan,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<Figures>, QualityError> {
    let reference = Reference::new(target, window)?;
    let heads = target.config().num_layers * target.config().num_kv_heads;
    let total = (window.tokens.len() - window.prompt) as u64 * plan.settings.len() as u64;
    let mut done = 0;
    let mut sums: Option<PromptSums> = None;
    let mut figures = Vec::new();
    for &Setting { method, value } in &plan.settings {
        let policy = MaskPolicy {
            p: value,
            ..plan.policy
        };
        let budget = f64::from(value);
        if method == Method::H2o && sums.is_none() {
            sums = Some(prompt_sums(target, window)?);
        }
        let every_step = OwnPolicy {
            capture_every: 1,
            ..plan.own
        };
        let mut masker: Box<dyn Masker + '_> = match method {
            Method::Dense => Box::new(Everything),
            Method::Ours => Box::new(Served::new(draft, &plan.map, policy, plan.own)),
            Method::Paper => Box::new(Served::new(draft, &plan.paper_map, policy, every_step)),
            Method::StreamingLlm => {
                let sinks = policy.sink_tokens as usize;
                Box::new(Streaming::new(sinks, budget, heads))
            }
            Method::H2o => Box::new(HeavyHitters::new(
                budget,
                sums.as_ref().unwrap_or(&Vec::new()),
            )),
            Method::Quest => Box::new(ByKeys(Quest { budget, policy })),
            Method::Oracle => Box::new(ByKeys(Oracle { policy })),
        };
        let advance = &mut |tokens| {
            done += tokens;
            progress(done, total);
        };
        figures.push(run(target, window, &reference, &mut *masker, advance)?);
    }
    Ok(figures)
}

/// Attention that the prompt's positions gathered, by every [`PROMPT_STRIDE`]th of its rows.
fn prompt_sums(target: &mut Model, window: &Window<'_>) -> Result<PromptSums, QualityError> {
    let heads = target.config().num_layers * target.config().num_kv_heads;
    let cached = window.prompt - 1;
    let mut sums = vec![vec![0.0f32; cached]; heads];
    let mut sequence = target.new_sequence(window.prompt)?;
    for chunk in window.tokens[..cached].chunks(PROMPT_STRIDE) {
        let (last, before) = chunk.split_last().expect("chunks are not empty");
        for (tokens, masses) in [(before, false), (std::slice::from_ref(last), true)] {
            if tokens.is_empty() {
                continue;
            }
            let output = target
                .forward(&mut [Step {
                    sequence: &mut sequence,
                    tokens,
                    lists: None,
                    logits: LogitRows::None,
                    capture: &[],
                    masses,
                }])?
                .remove(0);
            let of_head = output.masses.unwrap_or_default().of_head;
            for (sums, masses) in sums.iter_mut().zip(of_head) {
                for (sum, mass) in sums.iter_mut().zip(masses) {
                    *sum += mass * PROMPT_STRIDE as f32;
                }
            }
        }
    }
    Ok(sums)
}
