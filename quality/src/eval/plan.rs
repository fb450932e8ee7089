//! [`Method`]: what is compared, at which settings, and [`measure`]: all of it over one window.

use std::sync::Arc;

use specattn_draft::OwnPolicy;
use specattn_engine::{Model, Step};
use specattn_mask::{LayerMap, MaskPolicy};

use crate::error::QualityError;
use crate::eval::chosen::{ByKeys, Oracle, Previous, Quest};
use crate::eval::dense::Reference;
use crate::eval::figures::Figures;
use crate::eval::h2o::{HeavyHitters, PromptSums};
use crate::eval::method::{Choice, Masker};
use crate::eval::rounds::{Window, run};
use crate::eval::served::Served;
use crate::eval::streaming::Streaming;
use crate::eval::trace::DraftTrace;

/// Every so many prompt positions one's attention counts for H2O's sums over the prompt.
const PROMPT_STRIDE: usize = 8;

/// Ways to choose what the target reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// Everything.
    Dense,
    /// One of [`Plan::maps`], as served.
    Map(usize),
    /// Sinks and a window.
    StreamingLlm,
    /// Heavy hitters.
    H2o,
    /// Pages by bounds on their keys.
    Quest,
    /// The target's own top-p of the round before.
    Previous,
    /// The target's own top-p.
    Oracle,
}

impl Method {
    /// Whether its setting is p, the mass to reach; else it is the share of the context to read.
    pub fn is_by_mass(self) -> bool {
        matches!(self, Self::Map(_) | Self::Previous | Self::Oracle)
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

/// A layer map, and the draft before it.
#[derive(Debug, Clone)]
pub struct ServedMap {
    /// The map.
    pub map: Arc<LayerMap>,
    /// What the draft reads of its own entries.
    pub own: OwnPolicy,
}

/// What every measurement shares.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What to compare.
    pub settings: Vec<Setting>,
    /// What [`Method::Map`] counts.
    pub maps: Vec<ServedMap>,
    /// Sinks, window and granularity; p is the setting's.
    pub policy: MaskPolicy,
}

struct Everything;

impl Masker for Everything {
    fn choose(&mut self, _base: usize) -> Result<Choice<'_>, QualityError> {
        Ok(Choice::Dense)
    }
}

/// Runs every setting of `plan` over `window`; one [`Figures`] each. `progress` hears (done, in all), in rounds' tokens.
///
/// Both models read the window's prompt once. The draft's rows are recorded for one policy of its reads at a time:
/// settings of maps with the same policy belong together.
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
    let mut sequence = target.new_sequence(window.tokens.len())?;
    let reference = Reference::new(target, &mut sequence, window)?;
    let heads = target.config().num_layers * target.config().num_kv_heads;
    let max_context = target.config().max_context;
    let total = (window.tokens.len() - window.prompt) as u64 * plan.settings.len() as u64;
    let mut done = 0;
    let mut sums: Option<PromptSums> = None;
    let mut trace: Option<(OwnPolicy, DraftTrace)> = None;
    let mut figures = Vec::new();
    for &Setting { method, value } in &plan.settings {
        let policy = MaskPolicy {
            p: value,
            ..plan.policy
        };
        let budget = f64::from(value);
        let mut masker: Box<dyn Masker + '_> = match method {
            Method::Dense => Box::new(Everything),
            Method::Map(index) => {
                let ServedMap { map, own, .. } = plan.maps.get(index).ok_or_else(|| {
                    QualityError::Served(format!("map {index} of {}", plan.maps.len()))
                })?;
                let (_, trace) = match trace.take().filter(|(recorded, _)| recorded == own) {
                    Some(recorded) => trace.insert(recorded),
                    None => {
                        let layers = draft_layers(&plan.maps);
                        let recorded =
                            DraftTrace::record(draft, window, *own, &plan.policy, &layers)?;
                        trace.insert((*own, recorded))
                    }
                };
                Box::new(Served::new(trace, map, policy, max_context))
            }
            Method::StreamingLlm => {
                let sinks = policy.sink_tokens as usize;
                Box::new(Streaming::new(sinks, budget, heads))
            }
            Method::H2o => {
                let sums = match sums.take() {
                    Some(known) => sums.insert(known),
                    None => sums.insert(prompt_sums(target, window)?),
                };
                Box::new(HeavyHitters::new(budget, sums))
            }
            Method::Quest => Box::new(ByKeys(Quest { budget, policy })),
            Method::Previous => Box::new(ByKeys(Previous {
                policy,
                last: Vec::new(),
            })),
            Method::Oracle => Box::new(ByKeys(Oracle { policy })),
        };
        let advance = &mut |tokens| {
            done += tokens;
            progress(done, total);
        };
        figures.push(run(
            target,
            &mut sequence,
            window,
            &reference,
            &mut *masker,
            advance,
        )?);
    }
    Ok(figures)
}

/// The draft layers that any of `maps` needs, increasing.
fn draft_layers(maps: &[ServedMap]) -> Vec<usize> {
    let mut layers: Vec<usize> = maps.iter().flat_map(|m| m.map.draft_layers()).collect();
    layers.sort_unstable();
    layers.dedup();
    layers
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
                    masses,
                    ..Step::new(&mut sequence, tokens)
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
