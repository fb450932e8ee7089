//! Attention of a few query rows: decoding, drafting and verification, dense or by index list.
//!
//! Work is cut into units of one KV head and [`CHUNK`] keys; every unit leaves a partial softmax (maximum, sum,
//! weighted values) per query row, and [`Combine`] joins them in key order. Chunks are fixed in size, so neither the
//! number of threads nor the other rows change a row's bits.
//!
//! Rows of a unit: `row = token * group + head_in_group`, where `group` query heads share the KV head.

mod probabilities;
mod unit;

use self::probabilities::{CaptureKernel, MassKernel, Weights};
use self::unit::{Entries, UnitKernel};
use super::NO_SCORE;
use crate::attention::HeadLists;
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
        lists: Option<&'a HeadLists>,
        head: usize,
        past: usize,
        tokens: usize,
    ) -> Self {
        let list = lists.map(|l| l.lists[l.of_head[head] as usize].as_slice());
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

/// Decode attention of one span in one layer.
pub(crate) struct DecodeAttention<'a, E> {
    pub(crate) kv: LayerKv<E>,
    pub(crate) blocks: &'a [u32],
    pub(crate) shape: AttentionShape,
    /// Per KV head, what it reads.
    pub(crate) keys: &'a [Keys<'a>],
    /// Rotated queries times 1/√head_dim: `[tokens, num_heads, padded_dim]`.
    pub(crate) q: &'a [f32],
    /// `[tokens, num_heads * head_dim]`.
    pub(crate) out: &'a mut [f32],
    /// Where the last token's probabilities go: `[num_heads, kv_len]`, zeroed by the caller.
    pub(crate) capture: Option<&'a mut [f32]>,
    /// Where the mean probability of each cached key goes, per KV head in the order of its keys.
    pub(crate) masses: Option<&'a mut [Vec<f32>]>,
}

/// Scratch memory that lives as long as the backend.
pub(crate) struct DecodeScratch {
    /// Per unit: `[rows]` maxima, `[rows]` sums, `[rows, padded_dim]` values.
    partials: Buffer,
    /// Per unit, where probabilities are wanted: `[rows, CHUNK]` weights under the unit's maxima.
    weights: Buffer,
    /// Maximum and sum of each row: `[num_kv_heads, rows, 2]`.
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

/// A chunk of keys of one KV head.
struct Unit {
    kv_head: usize,
    first_key: usize,
    num_keys: usize,
}

impl<E: Element> DecodeAttention<'_, E> {
    /// Computes `out` (and the captured rows) on all threads of the pool.
    pub(crate) fn run(self, isa: Isa, pool: &Pool, scratch: &mut DecodeScratch) {
        let tokens = self.keys[0].tokens;
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let rows = tokens * group;
        let dim = self.kv.padded_dim;
        let units: Vec<Unit> = self
            .keys
            .iter()
            .enumerate()
            .flat_map(|(kv_head, keys)| {
                let len = keys.len();
                (0..len).step_by(CHUNK).map(move |first_key| Unit {
                    kv_head,
                    first_key,
                    num_keys: CHUNK.min(len - first_key),
                })
            })
            .collect();
        let stride = rows * (2 + dim);
        scratch.partials.resize(units.len() * stride);
        let partials = SharedSlice::new(&mut scratch.partials);
        let wanted = self.masses.is_some() || self.capture.is_some();
        let kept = if wanted { rows * CHUNK } else { 0 };
        scratch.weights.resize(units.len() * kept);
        let weights = SharedSlice::new(&mut scratch.weights);
        scratch.softmax.resize(self.keys.len() * rows * 2);
        pool.run(units.len(), &|index| {
            let unit = &units[index];
            let mut own;
            let weights = if wanted {
                // SAFETY: every unit has its own stretch of the weights.
                unsafe { weights.range(index * kept, kept) }
            } else {
                own = Scratch::take(rows * CHUNK);
                &mut own
            };
            isa.run(UnitKernel {
                entries: Entries {
                    kv: self.kv,
                    blocks: self.blocks,
                    keys: self.keys[unit.kv_head],
                    kv_head: unit.kv_head,
                },
                group,
                num_heads: self.shape.num_heads,
                q: self.q,
                first_key: unit.first_key,
                num_keys: unit.num_keys,
                // SAFETY: every unit has its own stretch of the partials.
                partial: unsafe { partials.range(index * stride, stride) },
                weights,
            });
        });
        isa.run(Combine {
            shape: self.shape,
            dim,
            tokens,
            units: &units,
            partials: &scratch.partials,
            out: self.out,
            softmax: &mut scratch.softmax,
        });
        let weights_of = |index: usize| {
            let unit = &units[index];
            Weights {
                unit,
                weights: &scratch.weights[index * kept..][..kept],
                maxima: &scratch.partials[index * stride..][..rows],
                softmax: &scratch.softmax[unit.kv_head * rows * 2..][..rows * 2],
            }
        };
        if let Some(capture) = self.capture {
            let kv_len = self.keys[0].past + tokens;
            for (index, unit) in units.iter().enumerate() {
                let kv_head = unit.kv_head;
                for in_group in 0..group {
                    let head = kv_head * group + in_group;
                    isa.run(CaptureKernel {
                        from: weights_of(index),
                        row: (tokens - 1) * group + in_group,
                        keys: self.keys[kv_head],
                        out: &mut capture[head * kv_len..][..kv_len],
                    });
                }
            }
        }
        let Some(masses) = self.masses else { return };
        for (masses, keys) in masses.iter_mut().zip(self.keys) {
            masses.resize(keys.cached(), 0.0);
        }
        let masses: Vec<SharedSlice<f32>> =
            masses.iter_mut().map(|m| SharedSlice::new(m)).collect();
        pool.run(units.len(), &|index| {
            let unit = &units[index];
            let cached = self.keys[unit.kv_head].cached();
            let listed = cached.saturating_sub(unit.first_key).min(unit.num_keys);
            isa.run(MassKernel {
                from: weights_of(index),
                // SAFETY: units cover disjoint keys.
                out: unsafe { masses[unit.kv_head].range(unit.first_key.min(cached), listed) },
            });
        });
    }
}

/// Joins the partial softmaxes of all units into the output rows.
struct Combine<'a> {
    shape: AttentionShape,
    dim: usize,
    tokens: usize,
    units: &'a [Unit],
    partials: &'a [f32],
    out: &'a mut [f32],
    /// Takes maximum and sum of each row: `[num_kv_heads, rows, 2]`.
    softmax: &'a mut [f32],
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        let rows = self.tokens * group;
        let stride = rows * (2 + self.dim);
        let head_dim = self.shape.head_dim;
        let mut value = Scratch::take(self.dim);
        for kv_head in 0..self.shape.num_kv_heads {
            let first = self.units.partition_point(|u| u.kv_head < kv_head);
            let end = self.units.partition_point(|u| u.kv_head <= kv_head);
            for row in 0..rows {
                let part = |unit: usize, at: usize| self.partials[unit * stride + at];
                let top = (first..end).map(|u| part(u, row)).fold(NO_SCORE, f32::max);
                let mut sum = 0.0;
                value.fill(0.0);
                for unit in first..end {
                    let maximum = part(unit, row);
                    if maximum == NO_SCORE {
                        continue;
                    }
                    let from =
                        &self.partials[unit * stride + 2 * rows + row * self.dim..][..self.dim];
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
