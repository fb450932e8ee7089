//! [`Pair`]: draft and target run speculative rounds as the workers do, and every mask is judged beside dense attention.
//!
//! Proposals are sampled; the target's dense forward judges them and decides how the text goes on, so that settings
//! differ in nothing but the draft. Masked forwards run beside it over the target's dense KV entries: their divergence is
//! a little below what a sparse session sees, whose entries are those of masked passes.

use anyhow::{Context, Result, ensure};
use specattn_draft::{OwnPolicy, OwnReads, RowSelector};
use specattn_engine::sampling::{
    Candidate, CounterRng, Distribution, DraftToken, History, Sampler, SamplingParams, draft_token,
    verify_round,
};
use specattn_engine::{HeadLists, LogitRows, Model, Sequence, Step, StepOutput};
use specattn_mask::{Decoder, Encoder, LayerMap, Limits, MaskPolicy, read_list};

use super::figures::{Figures, MaskFigures};

/// Prompt tokens per forward.
const CHUNK: usize = 512;

/// Most entries of a draft token's distribution.
const Q_ENTRIES: usize = 256;

/// How rounds are run.
#[derive(Debug, Clone)]
pub struct Setting {
    /// What the draft reads of its own cache.
    pub own: OwnPolicy,
    /// Draft tokens per round.
    pub draft_length: usize,
    /// Mask policies to judge.
    pub masks: Vec<MaskPolicy>,
    /// Sampling rule, with the session's seed.
    pub sampling: SamplingParams,
    /// Sparse steps hand out rows too.
    pub listen: bool,
}

/// A draft and a target that have read the same prompt.
pub struct Pair<'a> {
    draft: &'a mut Model,
    target: &'a mut Model,
    map: &'a LayerMap,
    prompt: Vec<u32>,
    draft_cache: Sequence,
    target_cache: Sequence,
}

/// What one mask policy needs.
struct Mask {
    policy: MaskPolicy,
    selector: RowSelector,
    encoder: Encoder,
    decoder: Decoder,
}

impl<'a> Pair<'a> {
    /// Reads `prompt` with both models; `room` tokens may follow it.
    ///
    /// # Errors
    /// When a model fails or the prompt does not fit.
    pub fn new(
        (draft, target): (&'a mut Model, &'a mut Model),
        map: &'a LayerMap,
        prompt: Vec<u32>,
        room: usize,
    ) -> Result<Self> {
        ensure!(prompt.len() > 1, "a prompt of one token has no context");
        let mut draft_cache = draft.new_sequence(prompt.len() + room)?;
        let mut target_cache = target.new_sequence(prompt.len() + room)?;
        for chunk in prompt[..prompt.len() - 1].chunks(CHUNK) {
            forward(draft, &mut draft_cache, chunk, LogitRows::None, None)?;
            forward(target, &mut target_cache, chunk, LogitRows::None, None)?;
        }
        Ok(Self {
            draft,
            target,
            map,
            prompt,
            draft_cache,
            target_cache,
        })
    }

    /// Runs rounds after the prompt until `tokens` tokens are committed, and forgets them again.
    ///
    /// # Errors
    /// When a model fails.
    pub fn run(&mut self, setting: &Setting, tokens: usize) -> Result<Figures> {
        let mut masks: Vec<Mask> = setting.masks.iter().map(|&p| self.mask(p)).collect();
        let mut figures = Figures::new(masks.len());
        let num_kv_heads = self.draft.config().num_kv_heads;
        let mut own = OwnReads::new(setting.own, &MaskPolicy::default(), num_kv_heads);
        let vocab_size = self.target.config().vocab_size;
        let mut sampler = Sampler::new(setting.sampling.clone(), vocab_size)?;
        let rng = CounterRng::new(setting.sampling.seed);
        let mut text = self.prompt.clone();
        let end = text.len() + tokens;
        while text.len() < end {
            let draft = self.propose(setting, &text, (&mut own, &mut masks), &mut figures)?;
            let n = text.len();
            let mut input = vec![text[n - 1]];
            input.extend(draft.iter().map(|d| d.token));
            let mut masked = Vec::new();
            for (mask, figures) in masks.iter_mut().zip(&mut figures.masks) {
                masked.push(self.masked(mask, &input, n, figures)?);
            }
            let cache = &mut self.target_cache;
            cache.truncate(n - 1);
            let dense = forward(self.target, cache, &input, LogitRows::All, None)?;
            let p: Vec<Distribution> = dense
                .logits
                .chunks_exact(vocab_size)
                .map(|row| sampler.distribution(row, History::default()))
                .collect::<Result<_, _>>()?;
            figures.rounds += 1;
            figures.expected_tokens += expected_tokens(&p, &draft);
            let candidates: Vec<Candidate<'_>> = draft.iter().map(Candidate::from).collect();
            let outcome = verify_round(&p, &candidates, &rng, &text);
            let used = (outcome.accepted + 1) * vocab_size;
            for (logits, figures) in masked.iter().zip(&mut figures.masks) {
                figures.compare(&dense.logits[..used], &logits[..used], vocab_size);
            }
            text.extend_from_slice(&input[1..=outcome.accepted]);
            text.push(outcome.next_token);
            cache.truncate(text.len() - 1);
            // The last draft token was not fed.
            let fed = self.draft_cache.len().min(text.len() - 1);
            self.draft_cache.truncate(fed);
        }
        self.target_cache.truncate(self.prompt.len() - 1);
        self.draft_cache.truncate(self.prompt.len() - 1);
        Ok(figures)
    }

    fn mask(&self, policy: MaskPolicy) -> Mask {
        Mask {
            policy,
            selector: RowSelector::new(policy, self.map.sources.clone()),
            encoder: Encoder::new(),
            decoder: Decoder::new(Limits::default()),
        }
    }

    /// A round's draft steps.
    fn propose(
        &mut self,
        setting: &Setting,
        text: &[u32],
        (own, masks): (&mut OwnReads, &mut [Mask]),
        figures: &mut Figures,
    ) -> Result<Vec<DraftToken>> {
        let config = self.draft.config();
        let mut sampler = Sampler::new(setting.sampling.clone(), config.vocab_size)?;
        let layers: Vec<usize> = (0..config.num_layers).collect();
        let rng = CounterRng::new(setting.sampling.seed);
        let mut draft: Vec<DraftToken> = Vec::new();
        for mask in masks.iter_mut() {
            mask.selector.begin(text.len() - 1);
        }
        for step in 0..setting.draft_length {
            let cache = &mut self.draft_cache;
            let input: Vec<u32> = match draft.last() {
                Some(last) => vec![last.token],
                None => text[cache.len()..].to_vec(),
            };
            let dense = own.captures(step, setting.draft_length);
            own.fit(cache.len());
            let lists = (!dense).then(|| own.lists());
            let capture = if dense || setting.listen {
                &layers[..]
            } else {
                &[]
            };
            let step = Step {
                lists,
                logits: LogitRows::Last,
                capture,
                ..Step::new(cache, &input)
            };
            let output = self
                .draft
                .forward(&mut [step])?
                .pop()
                .context("an output")?;
            figures.draft += output.kv;
            if let Some(rows) = &output.attention {
                for mask in masks.iter_mut() {
                    mask.selector.add_step(rows)?;
                }
            }
            match &output.attention {
                Some(rows) if dense => own.captured(rows),
                _ => own.passed(),
            }
            let q = sampler.distribution(&output.logits, History::default())?;
            let position = (text.len() + draft.len()) as u64;
            let (token, q) = draft_token(&q, Q_ENTRIES, &rng, position);
            draft.push(DraftToken { token, q: Some(q) });
        }
        Ok(draft)
    }

    /// The logits of a masked target forward over a round's input.
    fn masked(
        &mut self,
        mask: &mut Mask,
        input: &[u32],
        n: usize,
        figures: &mut MaskFigures,
    ) -> Result<Vec<f32>> {
        let bytes = mask.encoder.encode(mask.selector.finish());
        figures.bytes += bytes.len() as u64;
        let round = mask.decoder.decode(&bytes)?;
        let lists = HeadLists {
            lists: round
                .sources
                .iter()
                .map(|selection| read_list(selection.clone(), &mask.policy, n))
                .collect(),
            of_head: self.map.of_head.iter().flatten().copied().collect(),
        };
        self.target_cache.truncate(n - 1);
        let cache = &mut self.target_cache;
        let output = forward(self.target, cache, input, LogitRows::All, Some(&lists))?;
        figures.target += output.kv;
        Ok(output.logits.to_vec())
    }
}

impl MaskFigures {
    /// Adds rows of `vocab_size` logits, dense beside masked.
    fn compare(&mut self, dense: &[f32], masked: &[f32], vocab_size: usize) {
        let rows = dense.chunks_exact(vocab_size);
        for (dense, masked) in rows.zip(masked.chunks_exact(vocab_size)) {
            let (p, q) = (log_normaliser(dense), log_normaliser(masked));
            let terms = dense.iter().zip(masked).map(|(&a, &b)| {
                let (a, b) = (f64::from(a) - p, f64::from(b) - q);
                a.exp() * (a - b)
            });
            self.divergence += terms.sum::<f64>();
            self.agreed += u64::from(largest(dense) == largest(masked));
            self.rows += 1;
        }
    }
}

/// 1 + Σ_i Π_{j ≤ i} Σ min(p_j, q_j): what a round commits on average over the draft's choices after each prefix.
fn expected_tokens(p: &[Distribution], draft: &[DraftToken]) -> f64 {
    let mut reached = 1.0;
    let mut expected = 1.0;
    for (p, draft) in p.iter().zip(draft) {
        let q = draft.q.iter().flat_map(|q| q.ids.iter().zip(&q.probs));
        let overlap: f64 = q.map(|(&id, &q)| f64::from(p.prob(id).min(q))).sum();
        reached *= overlap;
        expected += reached;
    }
    expected
}

fn log_normaliser(logits: &[f32]) -> f64 {
    let top = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
    top + sum.ln()
}

fn largest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

fn forward(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    logits: LogitRows,
    lists: Option<&HeadLists>,
) -> Result<StepOutput> {
    let step = Step {
        lists,
        logits,
        ..Step::new(sequence, tokens)
    };
    model.forward(&mut [step])?.pop().context("an output")
}
