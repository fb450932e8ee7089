//! The one transformer: Llama, Mistral, Qwen2 and Qwen3, for both roles and every backend.
//!
//! Pre-norm blocks: x += Attention(norm(x)); x += MLP(norm(x)) with a gated SiLU MLP, rotary positions, grouped-query
//! attention (Touvron et al. 2023). Families differ in biases and per-head norms, both of which are data here.

use specattn_positions::PositionSet;

use crate::attention::{AttentionRows, EntryMasses, HeadLists, KvReads, SpanLists};
use crate::backend::{AttentionArgs, AttentionShape, Backend, Epilogue, Linear, Pass, RotateArgs};
use crate::chooser::{KeyChooser, LayerKeys};
use crate::communicator::{Addend, Communicator, Norm};
use crate::config::ModelConfig;
use crate::crew::Crew;
use crate::error::EngineError;
use crate::floats::Floats;
use crate::model::{LogitRows, Step, StepOutput};
use crate::pass_layout::{all_masses, hand_out, hand_out_logits, layout, span_lists};
use crate::row_selection::SelectedRows;
use crate::share::Share;
use crate::weights::Weights;

/// A dense step of at least this many tokens runs alone, on the kernels for many rows.
const BULK_TOKENS: usize = 32;

/// Activations, kept from one pass to the next.
struct Activations<T> {
    hidden: T,
    angles: T,
    normed: T,
    qkv: T,
    q: T,
    attended: T,
    mlp: T,
    selected: T,
    logits: T,
}

/// Where a transformer stands among those that run one model together.
pub(crate) struct Place<B> {
    /// What it holds of the model.
    pub(crate) share: Share,
    /// How it meets the others; `None` where there are none.
    pub(crate) group: Option<Box<dyn Communicator<B>>>,
}

/// What [`Transformer::new`] puts together.
pub(crate) struct Parts<B: Backend> {
    pub(crate) backend: B,
    pub(crate) weights: Weights<B::Weight>,
    pub(crate) kv: B::Kv,
    /// Of the whole model.
    pub(crate) config: ModelConfig,
    pub(crate) place: Place<B>,
    pub(crate) crew: Crew,
}

/// A model's weights, KV memory and activations on a backend, or one rank's share of them.
pub(crate) struct Transformer<B: Backend> {
    backend: B,
    config: ModelConfig,
    inverse_frequencies: Vec<f32>,
    weights: Weights<B::Weight>,
    kv: B::Kv,
    activations: Activations<B::Buffer>,
    /// Of this rank's heads.
    shape: AttentionShape,
    place: Place<B>,
    crews: Crews,
}

/// Who helps with what.
struct Crews {
    /// Counting the lists of a pass.
    counting: Crew,
    /// Handing them to the device.
    listing: Crew,
    /// Taking selections from it.
    selecting: Crew,
    /// The same of logits.
    fetching: Crew,
}

/// What a rank yields for a step: its heads' attention, its part of the vocabulary's logits, its KV heads' masses and reads.
/// Of a model that is not split: everything.
pub(crate) struct RankOutput {
    pub(crate) step: StepOutput,
    /// `[rows]`, beside [`StepOutput::argmax`], whose columns are the rank's own: their logits.
    pub(crate) peaks: Vec<f32>,
}

impl<B: Backend> Transformer<B> {
    /// A model, or a rank's share of one, from its weights and its KV memory.
    ///
    /// # Errors
    /// When the device cannot be made ready for it.
    pub(crate) fn new(parts: Parts<B>) -> Result<Self, EngineError> {
        let Parts {
            backend,
            weights,
            kv,
            config,
            place,
            crew,
        } = parts;
        let shape = place.share.attention(&config);
        backend.prepare(&shape)?;
        let buffer = || backend.buffer();
        let activations = Activations {
            hidden: buffer(),
            angles: buffer(),
            normed: buffer(),
            qkv: buffer(),
            q: buffer(),
            attended: buffer(),
            mlp: buffer(),
            selected: buffer(),
            logits: buffer(),
        };
        let inverse_frequencies = config.inverse_frequencies();
        Ok(Self {
            backend,
            inverse_frequencies,
            config,
            weights,
            kv,
            activations,
            shape,
            place,
            crews: Crews {
                counting: crew.clone(),
                listing: crew.clone(),
                selecting: crew.clone(),
                fetching: crew,
            },
        })
    }

    /// Where it stands among the model's ranks.
    pub(crate) fn place(&self) -> &Place<B> {
        &self.place
    }

    /// The whole model's configuration.
    pub(crate) fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Copies KV blocks, each (from, to).
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn copy_blocks(&mut self, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        self.backend.copy_blocks(&mut self.kv, copies)
    }

    /// Runs checked steps: long dense ones alone, all others together. The sequences' lengths are left to the caller.
    ///
    /// # Errors
    /// When the device fails.
    pub(crate) fn forward(&mut self, steps: &[Step<'_>]) -> Result<Vec<RankOutput>, EngineError> {
        let is_bulk = |s: &Step<'_>| {
            let exact = matches!(s.logits, LogitRows::Verify | LogitRows::Replay);
            let plain =
                s.lists.is_none() && s.capture.is_empty() && s.select.is_none() && !s.masses;
            plain && !exact && s.tokens.len() >= BULK_TOKENS
        };
        let mut outputs: Vec<RankOutput> = steps.iter().map(|s| self.output_of(s)).collect();
        let (mut small, mut small_outputs) = (Vec::new(), Vec::new());
        for (step, output) in steps.iter().zip(&mut outputs) {
            if is_bulk(step) {
                self.pass(&[step], &mut [output], true, None)?;
            } else {
                small.push(step);
                small_outputs.push(output);
            }
        }
        if !small.is_empty() {
            self.pass(&small, &mut small_outputs, false, None)?;
        }
        Ok(outputs)
    }

    /// Runs one checked step without lists, whose reads `chooser` chooses; `None` where the device cannot.
    pub(crate) fn forward_choosing(
        &mut self,
        step: &Step<'_>,
        chooser: &mut dyn KeyChooser,
    ) -> Result<Option<StepOutput>, EngineError> {
        let keys = self.backend.keys(&self.kv, 0, step.sequence.blocks(), 0);
        if keys.is_none() {
            return Ok(None);
        }
        let mut output = self.output_of(step);
        self.pass(&[step], &mut [&mut output], false, Some(chooser))?;
        Ok(Some(output.step))
    }

    /// An output with room for captured rows, and the step's KV reads.
    fn output_of(&self, step: &Step<'_>) -> RankOutput {
        let (c, shape) = (&self.config, &self.shape);
        let kv_len = step.sequence.len() + step.tokens.len();
        let selects = step.select.is_some()
            && step.lists.is_none()
            && !step.masses
            // A row mixes heads of all ranks.
            && self.place.share.is_whole()
            && self.backend.selects(kv_len);
        let attention = (!selects && !step.capture.is_empty()).then(|| AttentionRows {
            layers: step.capture.to_vec(),
            num_heads: shape.num_heads,
            kv_len,
            probs: vec![0.0; step.capture.len() * shape.num_heads * kv_len],
        });
        let heads = c.num_layers * shape.num_kv_heads;
        let dense = (heads * kv_len) as u64;
        let step = StepOutput {
            logits: Floats::default(),
            argmax: Vec::new(),
            attention,
            selected: selects.then(|| SelectedRows {
                kv_len,
                words: Vec::new(),
            }),
            masses: step.masses.then(|| EntryMasses {
                of_head: vec![Vec::new(); heads],
            }),
            // What is read the pass's lists say.
            kv: KvReads { read: 0, dense },
        };
        RankOutput {
            step,
            peaks: Vec::new(),
        }
    }

    /// One forward over the rows of `steps`.
    fn pass(
        &mut self,
        steps: &[&Step<'_>],
        outputs: &mut [&mut RankOutput],
        bulk: bool,
        mut chooser: Option<&mut dyn KeyChooser>,
    ) -> Result<(), EngineError> {
        let own = |lists| self.place.share.lists(lists, &self.config);
        let crews = &mut self.crews;
        let lists = span_lists(steps, &mut crews.counting, own);
        let pass = layout(steps, outputs, bulk, lists);
        let shape = self.shape;
        let eps = self.config.rms_norm_eps;
        let heads = self.config.num_layers * shape.num_kv_heads;
        let mut reads = 0;
        if chooser.is_none() {
            for (output, span) in outputs.iter_mut().zip(&pass.spans) {
                output.step.kv.read = span.entries(heads);
            }
        }
        let (backend, kv, weights) = (&self.backend, &self.kv, &self.weights);
        let (place, a) = (&self.place, &mut self.activations);
        let _turn = backend.begin(&pass, &shape, &mut crews.listing);
        backend.embed(&weights.embedding.weight, &pass, &mut a.hidden);
        backend.angles(&pass, &self.inverse_frequencies, &mut a.angles);
        if let Some(first) = weights.layers.first() {
            backend.rms_norm(&a.hidden, &first.input_norm, eps, &mut a.normed);
        }
        for (index, layer) in weights.layers.iter().enumerate() {
            let [q, k, v] = &layer.qkv;
            backend.linear(&a.normed, &[q, k, v], Epilogue::Store, bulk, &mut a.qkv);
            let qk_norm = layer.qk_norm.as_ref().map(|(q, k)| (q, k, eps));
            let rotate = RotateArgs {
                shape,
                qk_norm,
                angles: &a.angles,
                kv,
                layer: index,
            };
            backend.rotate_and_store(&a.qkv, &pass, &rotate, &mut a.q);
            let mut wanted = hand_out(outputs, index, shape.num_kv_heads);
            let attend = AttentionArgs {
                shape,
                kv,
                layer: index,
            };
            if let Some(chooser) = &mut chooser {
                let lists = chosen_lists(backend, &a.q, &pass, &attend, &mut **chooser)?;
                let tokens = pass.tokens.len() as u64;
                reads += lists
                    .lists
                    .iter()
                    .map(|list| list.count() as u64 + tokens)
                    .sum::<u64>();
                let narrowed = pass.reading(SpanLists::from(&lists));
                backend.attention(&a.q, &narrowed, &attend, &mut wanted, &mut a.attended);
            } else {
                backend.attention(&a.q, &pass, &attend, &mut wanted, &mut a.attended);
            }
            let norm = Norm {
                weight: &layer.mlp_norm,
                eps,
                out: &mut a.normed,
            };
            let attended = (&a.attended, &layer.output);
            place.add(backend, attended, bulk, &mut a.hidden, Some(norm));
            backend.linear(
                &a.normed,
                &[&layer.gate, &layer.up],
                Epilogue::SwiGlu,
                bulk,
                &mut a.mlp,
            );
            let norm = weights.layers.get(index + 1).map(|next| Norm {
                weight: &next.input_norm,
                eps,
                out: &mut a.normed,
            });
            place.add(backend, (&a.mlp, &layer.down), bulk, &mut a.hidden, norm);
        }
        if !pass.logit_rows.is_empty() {
            let hidden = self.config.hidden_size;
            backend.gather_rows(&a.hidden, hidden, &pass, &mut a.selected);
            backend.rms_norm(&a.selected, &weights.final_norm, eps, &mut a.normed);
            let head = weights.head.as_ref().unwrap_or(&weights.embedding);
            backend.linear(
                &a.normed,
                &[head],
                Epilogue::Store,
                pass.logit_rows.len() >= BULK_TOKENS && bulk,
                &mut a.logits,
            );
        }
        if !pass.selections.is_empty() {
            let selected = outputs
                .iter_mut()
                .filter_map(|output| output.step.selected.as_mut());
            let mut selected = selected.collect::<Vec<_>>();
            backend.select(&pass, &mut selected, &mut crews.selecting)?;
        }
        let mut masses = all_masses(outputs);
        if !masses.is_empty() {
            backend.masses(&pass, &mut masses)?;
        }
        if !pass.logit_rows.is_empty() {
            let vocab = place.share.range(self.config.vocab_size);
            hand_out_logits(
                (backend, &mut crews.fetching),
                &mut a.logits,
                vocab,
                steps,
                outputs,
            )?;
        }
        backend.finish()?;
        for output in outputs {
            output.step.kv.read += reads;
        }
        Ok(())
    }
}

impl<B: Backend> Place<B> {
    /// Adds a projection to the residual stream, which all ranks have, and takes the norm that is next. Of a sum over ranks the first
    /// brings the stream and its own part, the others theirs alone: so the stream is never rounded apart from the sum.
    fn add(
        &self,
        backend: &B,
        (x, projection): (&B::Buffer, &Linear<B::Weight>),
        bulk: bool,
        stream: &mut B::Buffer,
        norm: Option<Norm<'_, B>>,
    ) {
        let epilogue = if self.share.is_first() {
            Epilogue::Add
        } else {
            Epilogue::Store
        };
        let addend = Addend {
            x,
            projection,
            epilogue,
            bulk,
        };
        if let Some(group) = &self.group {
            return group.add(backend, &addend, stream, norm);
        }
        addend.give(backend, stream);
        if let Some(norm) = norm {
            norm.of(backend, stream);
        }
    }

    /// Lets the other ranks go.
    pub(crate) fn leave(&self) {
        if let Some(group) = &self.group {
            group.leave();
        }
    }
}

/// What `chooser` lets the only span of `pass` read in one layer.
fn chosen_lists<B: Backend>(
    backend: &B,
    q: &B::Buffer,
    pass: &Pass<'_>,
    args: &AttentionArgs<'_, B>,
    chooser: &mut dyn KeyChooser,
) -> Result<HeadLists, EngineError> {
    let span = &pass.spans[0];
    let mut queries = Vec::new();
    backend.read(q, &mut queries)?;
    let (keys, width) = backend
        .keys(args.kv, args.layer, span.blocks, span.past)
        .expect("the device was asked before");
    let kv_heads = args.shape.num_kv_heads;
    let view = LayerKeys {
        q: &queries,
        keys: &keys,
        width,
        num_heads: args.shape.num_heads,
        num_kv_heads: kv_heads,
    };
    let lists = chooser.choose(args.layer, &view);
    // The kernels rely on it.
    let sound = |list: &PositionSet| list.len() <= span.past;
    assert!(
        lists.len() == kv_heads && lists.iter().all(sound),
        "a chooser lists cached positions for every KV head"
    );
    Ok(HeadLists {
        of_head: (0..=args.layer).flat_map(|_| 0..kv_heads as u32).collect(),
        lists,
    })
}
