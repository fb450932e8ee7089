//! Attention of a few query rows: decoding, drafting and verification, dense or by index list.
//!
//! Work is cut into units of one KV head and [`CHUNK`] keys; every unit leaves a partial softmax (maximum, sum,
//! weighted values) per query row, and [`Combine`] joins them in key order. Chunks are fixed in size, so neither the
//! number of threads nor the other rows change a row's bits. All spans of a pass go through one region of the pool: a
//! batch of short ones is as well shared out as a single long one.
//!
//! Rows of a unit: `row = token * group + head_in_group`, where `group` query heads share the KV head.

mod probabilities;
mod unit;

use self::probabilities::{CaptureKernel, MassKernel, Weights};
use self::unit::{Entries, UnitKernel};
use super::NO_SCORE;
use crate::attention::SpanLists;
use crate::backend::AttentionShape;
use crate::cpu::kv_store::LayerKv;
use crate::cpu::memory::{Buffer, Scratch};
use crate::cpu::pool::{Pool, SharedSlice};
use crate::cpu::simd::{Element, Isa, Kernel, Simd};

/// Keys per unit of work.
const CHUNK: usize = 256;

/// The keys that one KV head of one span reads, in order: cached positions, then the step's own tokens.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    /// Listed positions, or `None` for all of `0..past`.
    pub(crate) list: Option<&'a [u32]>,
    /// Positions cached before the step.
    pub(crate) past: usize,
    /// Tokens of the step.
    pub(crate) tokens: usize,
}

impl<'a> Keys<'a> {
    /// The keys of KV head `head`, counted through all layers: layer · num_kv_heads + KV head.
    pub(crate) fn of(
        lists: Option<&'a SpanLists<'_>>,
        head: usize,
        past: usize,
        tokens: usize,
    ) -> Self {
        let list = lists.map(|lists| lists.of(head).positions());
        Self { list, past, tokens }
    }

    /// Cached keys read.
    pub(crate) fn cached(&self) -> usize {
        self.list.map_or(self.past, <[u32]>::len)
    }

    /// Keys in all.
    fn len(&self) -> usize {
        self.cached() + self.tokens
    }

    /// Position of key `index`.
    #[inline(always)]
    fn position(&self, index: usize) -> usize {
        match self.list {
            Some(list) if index < list.len() => list[index] as usize,
            Some(list) => self.past + index - list.len(),
            None => index,
        }
    }
}

/// Decode attention of all spans of a pass in one layer.
pub(crate) struct DecodeAttention<'a, E> {
    pub(crate) kv: LayerKv<E>,
    pub(crate) shape: AttentionShape,
    pub(crate) spans: Vec<DecodeSpan<'a>>,
}

/// One span's part.
pub(crate) struct DecodeSpan<'a> {
    pub(crate) blocks: &'a [u32],
    /// Per KV head, what it reads.
    pub(crate) keys: Vec<Keys<'a>>,
    /// Rotated queries times 1/√head_dim: `[tokens, num_heads, padded_dim]`.
    pub(crate) q: &'a [f32],
    /// `[tokens, num_heads * head_dim]`.
    pub(crate) out: SharedSlice<f32>,
    /// Where the last token's probabilities go: `[num_heads, kv_len]`, zeroed by the caller.
    pub(crate) capture: Option<SharedSlice<f32>>,
    /// Where the mean probability of each cached key goes, per KV head in the order of its keys.
    pub(crate) masses: Option<Vec<SharedSlice<f32>>>,
}

impl DecodeSpan<'_> {
    /// Whether probabilities are wanted, not only what they sum.
    fn wants_weights(&self) -> bool {
        self.masses.is_some() || self.capture.is_some()
    }
}

/// Scratch memory that lives as long as the backend.
pub(crate) struct DecodeScratch {
    /// Per unit: `[rows]` maxima, `[rows]` sums, `[rows, padded_dim]` values.
    partials: Buffer,
    /// Per unit of spans whose probabilities are wanted: `[rows, CHUNK]` weights under the unit's maxima.
    weights: Buffer,
    /// Maximum and sum of each row, per span: `[num_kv_heads, rows, 2]`.
    softmax: Buffer,
}

impl DecodeScratch {
    pub(crate) fn new() -> Self {
        Self {
            partials: Buffer::new(),
            weights: Buffer::new(),
            softmax: Buffer::new(),
        }
    }
}

/// A chunk of keys of one KV head of one span.
struct Unit {
    span: usize,
    kv_head: usize,
    first_key: usize,
    num_keys: usize,
    /// Where its partial softmax begins.
    partial: usize,
    /// Where its weights begin, if they are kept.
    weights: usize,
}

/// Where a span's units and rows are.
struct SpanPlan {
    /// Rows of each KV head.
    rows: usize,
    units: std::ops::Range<usize>,
    /// Where its rows' maxima and sums begin.
    softmax: usize,
}

/// How the work is cut: every span's units, in the order of KV heads and keys.
struct Plan {
    spans: Vec<SpanPlan>,
    units: Vec<Unit>,
    /// Floats of all partial softmaxes, of all kept weights, and of all rows' maxima and sums.
    sizes: [usize; 3],
}

impl Plan {
    fn new(spans: &[DecodeSpan<'_>], group: usize, dim: usize) -> Self {
        let mut plan = Self {
            spans: Vec::with_capacity(spans.len()),
            units: Vec::new(),
            sizes: [0; 3],
        };
        for (index, span) in spans.iter().enumerate() {
            let rows = span.keys[0].tokens * group;
            let first_unit = plan.units.len();
            let [partial, weights, softmax] = &mut plan.sizes;
            for (kv_head, keys) in span.keys.iter().enumerate() {
                for first_key in (0..keys.len()).step_by(CHUNK) {
                    plan.units.push(Unit {
                        span: index,
                        kv_head,
                        first_key,
                        num_keys: CHUNK.min(keys.len() - first_key),
                        partial: *partial,
                        weights: *weights,
                    });
                    *partial += rows * (2 + dim);
                    *weights += if span.wants_weights() {
                        rows * CHUNK
                    } else {
                        0
                    };
                }
            }
            plan.spans.push(SpanPlan {
                rows,
                units: first_unit..plan.units.len(),
                softmax: *softmax,
            });
            *softmax += span.keys.len() * rows * 2;
        }
        plan
    }
}

impl<E: Element> DecodeAttention<'_, E> {
    /// Computes every span's output (and what is handed out) on all threads of the pool: the units of all spans in one
    /// region, then what joins them.
    pub(crate) fn run(self, isa: Isa, pool: &Pool, scratch: &mut DecodeScratch) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let plan = Plan::new(&self.spans, group, self.kv.padded_dim);
        scratch.partials.resize(plan.sizes[0]);
        scratch.weights.resize(plan.sizes[1]);
        scratch.softmax.resize(plan.sizes[2]);
        self.units(isa, pool, scratch, &plan);
        self.join(isa, pool, scratch, &plan);
        self.masses(isa, pool, scratch, &plan);
    }

    /// The partial softmaxes.
    fn units(&self, isa: Isa, pool: &Pool, scratch: &mut DecodeScratch, plan: &Plan) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let partials = SharedSlice::new(&mut scratch.partials);
        let weights = SharedSlice::new(&mut scratch.weights);
        pool.run(plan.units.len(), &|index| {
            let unit = &plan.units[index];
            let span = &self.spans[unit.span];
            let rows = plan.spans[unit.span].rows;
            let mut own;
            let weights = if span.wants_weights() {
                // SAFETY: every unit has its own stretch of the weights.
                unsafe { weights.range(unit.weights, rows * CHUNK) }
            } else {
                own = Scratch::take(rows * CHUNK);
                &mut own
            };
            isa.run(UnitKernel {
                entries: Entries {
                    kv: self.kv,
                    blocks: span.blocks,
                    keys: span.keys[unit.kv_head],
                    kv_head: unit.kv_head,
                },
                group,
                num_heads: self.shape.num_heads,
                q: span.q,
                first_key: unit.first_key,
                num_keys: unit.num_keys,
                // SAFETY: every unit has its own stretch of the partials.
                partial: unsafe { partials.range(unit.partial, rows * (2 + self.kv.padded_dim)) },
                weights,
            });
        });
    }

    /// Joins every span's partial softmaxes, and writes the rows that are captured.
    fn join(&self, isa: Isa, pool: &Pool, scratch: &mut DecodeScratch, plan: &Plan) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let DecodeScratch {
            partials,
            weights,
            softmax,
        } = scratch;
        let softmax = SharedSlice::new(softmax);
        pool.run(self.spans.len(), &|index| {
            let (span, cut) = (&self.spans[index], &plan.spans[index]);
            let heads = self.shape.num_kv_heads;
            // SAFETY: every span has its own stretch of the maxima and sums, and its own rows of the output.
            let (softmax, out) = unsafe {
                (
                    softmax.range(cut.softmax, heads * cut.rows * 2),
                    span.out.all(),
                )
            };
            let units = &plan.units[cut.units.clone()];
            isa.run(Combine {
                shape: self.shape,
                dim: self.kv.padded_dim,
                rows: cut.rows,
                units,
                partials,
                out,
                softmax,
            });
            let Some(capture) = &span.capture else { return };
            // SAFETY: every span has its own rows to capture.
            let capture = unsafe { capture.all() };
            let tokens = span.keys[0].tokens;
            let kv_len = span.keys[0].past + tokens;
            for unit in units {
                let from = Weights::of(unit, cut.rows, partials, weights, softmax);
                for in_group in 0..group {
                    let head = unit.kv_head * group + in_group;
                    isa.run(CaptureKernel {
                        from,
                        row: (tokens - 1) * group + in_group,
                        keys: span.keys[unit.kv_head],
                        out: &mut capture[head * kv_len..][..kv_len],
                    });
                }
            }
        });
    }

    /// What the entries that were read weighed, of the spans that hand it out.
    fn masses(&self, isa: Isa, pool: &Pool, scratch: &DecodeScratch, plan: &Plan) {
        let wanted: Vec<&Unit> = plan
            .units
            .iter()
            .filter(|unit| self.spans[unit.span].masses.is_some())
            .collect();
        pool.run(wanted.len(), &|index| {
            let unit = wanted[index];
            let (span, cut) = (&self.spans[unit.span], &plan.spans[unit.span]);
            let Some(masses) = &span.masses else { return };
            let cached = span.keys[unit.kv_head].cached();
            let listed = cached.saturating_sub(unit.first_key).min(unit.num_keys);
            let softmax = &scratch.softmax[cut.softmax..];
            isa.run(MassKernel {
                from: Weights::of(unit, cut.rows, &scratch.partials, &scratch.weights, softmax),
                // SAFETY: units cover disjoint keys.
                out: unsafe { masses[unit.kv_head].range(unit.first_key.min(cached), listed) },
            });
        });
    }
}

/// Joins the partial softmaxes of a span's units into its output rows.
struct Combine<'a> {
    shape: AttentionShape,
    dim: usize,
    /// Of each KV head.
    rows: usize,
    units: &'a [Unit],
    /// Of all spans.
    partials: &'a [f32],
    /// `[tokens, num_heads * head_dim]`.
    out: &'a mut [f32],
    /// Takes maximum and sum of each row: `[num_kv_heads, rows, 2]`.
    softmax: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let rows = self.rows;
        let head_dim = self.shape.head_dim;
        let mut value = Scratch::take(self.dim);
        for kv_head in 0..self.shape.num_kv_heads {
            let first = self.units.partition_point(|u| u.kv_head < kv_head);
            let end = self.units.partition_point(|u| u.kv_head <= kv_head);
            let units = &self.units[first..end];
            for row in 0..rows {
                let part = |unit: &Unit, at: usize| self.partials[unit.partial + at];
                let maxima = units.iter().map(|unit| part(unit, row));
                let top = maxima.fold(NO_SCORE, f32::max);
                let mut sum = 0.0;
                value.fill(0.0);
                for unit in units {
                    let maximum = part(unit, row);
                    if maximum == NO_SCORE {
                        continue;
                    }
                    let from = &self.partials[unit.partial + 2 * rows + row * self.dim..];
                    let from = &from[..self.dim];
                    // SAFETY: both slices hold `dim` floats, a multiple of LANES.
                    unsafe {
                        let scale = S::exp(S::splat(maximum - top));
                        sum += S::reduce_max(scale) * part(unit, rows + row);
                        for d in (0..self.dim).step_by(S::LANES) {
                            let v = value.as_mut_ptr().add(d);
                            S::store(v, S::fma(scale, S::load(from.as_ptr().add(d)), S::load(v)));
                        }
                    }
                }
                self.softmax[(kv_head * rows + row) * 2..][..2].copy_from_slice(&[top, sum]);
                let (token, head) = (row / group, kv_head * group + row % group);
                let out =
                    &mut self.out[(token * self.shape.num_heads + head) * head_dim..][..head_dim];
                for (out, &v) in out.iter_mut().zip(value.iter()) {
                    *out = v / sum;
                }
            }
        }
    }
}
