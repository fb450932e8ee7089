//! Dense causal attention of many query rows: prompt chunks.
//!
//! Vector lanes run over query rows: scores are kept transposed, `[key][row]`, so that maxima, sums and rescaling are
//! plain vertical operations and keys and values are read straight from the cache, one broadcast element at a time.
//! A unit of work is one KV head and as many tokens as fill [`ROWS`] rows with their group of query heads; it walks
//! the keys in blocks of [`BLOCK`] with an online softmax (Milakov and Gimelshein 2018).

use super::NO_SCORE;
use crate::backend::AttentionShape;
use crate::cpu::kv_store::LayerKv;
use crate::cpu::memory::Scratch;
use crate::cpu::pool::{Pool, SharedSlice};
use crate::cpu::simd::{Element, Isa, Kernel, Simd};

/// Query rows per unit.
const ROWS: usize = 64;
/// Keys per softmax update.
const BLOCK: usize = 64;
/// Rows of the matrix tile kept in registers; columns are `COLUMN_VECTORS` vectors.
const TILE: usize = 4;
/// Vectors of query rows per tile.
const COLUMN_VECTORS: usize = 4;

/// Prefill attention of one span in one layer.
pub(crate) struct PrefillAttention<'a, E> {
    pub(crate) kv: LayerKv<E>,
    pub(crate) blocks: &'a [u32],
    pub(crate) shape: AttentionShape,
    /// Positions cached before the chunk.
    pub(crate) past: usize,
    /// Tokens of the chunk.
    pub(crate) tokens: usize,
    /// Rotated queries times 1/√head_dim: `[tokens, num_heads, padded_dim]`.
    pub(crate) q: &'a [f32],
    /// `[tokens, num_heads * head_dim]`.
    pub(crate) out: &'a mut [f32],
}

impl<E: Element> PrefillAttention<'_, E> {
    /// Computes `out` on all threads of the pool.
    pub(crate) fn run(self, isa: Isa, pool: &Pool) {
        let group = self.shape.num_heads / self.shape.num_kv_heads;
        // A group wider than ROWS is cut into several units of one token.
        let heads = group.min(ROWS);
        let head_parts = group.div_ceil(heads);
        let tokens_per_unit = (ROWS / heads).min(self.tokens);
        let token_parts = self.tokens.div_ceil(tokens_per_unit);
        let out = SharedSlice::new(self.out);
        // Late tokens see more keys: start with them, so that the last unit to finish is a short one.
        pool.run(
            token_parts * head_parts * self.shape.num_kv_heads,
            &|index| {
                let part = token_parts - 1 - index / (head_parts * self.shape.num_kv_heads);
                let rest = index % (head_parts * self.shape.num_kv_heads);
                let (kv_head, head_part) = (rest / head_parts, rest % head_parts);
                let first_token = part * tokens_per_unit;
                let first_head = head_part * heads;
                isa.run(UnitKernel {
                    kv: self.kv,
                    blocks: self.blocks,
                    shape: self.shape,
                    past: self.past,
                    kv_head,
                    heads: (kv_head * group + first_head)
                        ..(kv_head * group + (first_head + heads).min(group)),
                    tokens: first_token..(first_token + tokens_per_unit).min(self.tokens),
                    q: self.q,
                    out,
                });
            },
        );
    }
}

struct UnitKernel<'a, E> {
    kv: LayerKv<E>,
    blocks: &'a [u32],
    shape: AttentionShape,
    past: usize,
    kv_head: usize,
    heads: std::ops::Range<usize>,
    tokens: std::ops::Range<usize>,
    q: &'a [f32],
    out: SharedSlice<f32>,
}

impl<E: Element> Kernel for UnitKernel<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let dim = self.kv.padded_dim;
        let group = self.heads.len();
        let rows = self.tokens.len() * group;
        let mut queries = Scratch::take(dim * ROWS);
        let mut scores = Scratch::take(BLOCK * ROWS);
        let mut values = Scratch::take(dim * ROWS);
        let mut wide = Scratch::take(if size_of::<E>() == size_of::<f32>() {
            0
        } else {
            2 * BLOCK * dim
        });
        let (mut maxima, mut sums, mut limits) = ([NO_SCORE; ROWS], [0.0f32; ROWS], [0.0f32; ROWS]);
        values.fill(0.0);
        queries.fill(0.0);
        for row in 0..ROWS {
            // Rows beyond the unit's repeat its last one; nobody reads them.
            let row_of = row.min(rows - 1);
            let (token, head) = (
                self.tokens.start + row_of / group,
                self.heads.start + row_of % group,
            );
            let q = &self.q[(token * self.shape.num_heads + head) * dim..][..dim];
            for (d, &x) in q.iter().enumerate() {
                queries[d * ROWS + row] = x;
            }
            limits[row] = (self.past + token + 1) as f32;
        }
        let last = self.past + self.tokens.end;
        let first_diagonal = self.past + self.tokens.start;
        // SAFETY: for the whole block: entries come from the block table and lie inside the store; ROWS is a multiple of
        // COLUMN_VECTORS vectors, BLOCK and `dim` of TILE; scratch sizes are those taken above.
        unsafe {
            for block in (0..last).step_by(BLOCK) {
                let mut keys = [std::ptr::null::<f32>(); BLOCK];
                for (j, key) in keys.iter_mut().enumerate() {
                    let position = (block + j).min(last - 1);
                    let entry = self
                        .kv
                        .entry(self.blocks, position, self.kv_head)
                        .cast_const();
                    *key = if wide.is_empty() {
                        entry.cast()
                    } else {
                        let to = wide.as_mut_ptr().add(j * 2 * dim);
                        for d in (0..2 * dim).step_by(S::LANES) {
                            S::store(to.add(d), E::load::<S>(entry.add(d)));
                        }
                        to
                    };
                }
                score::<S>(&keys, &queries, dim, &mut scores);
                if block + BLOCK > first_diagonal + 1 {
                    mask_future::<S>(&limits, block, &mut scores);
                }
                online_softmax::<S>(&mut scores, &mut maxima, &mut sums, &mut values);
                add_values::<S>(&keys, &scores, dim, &mut values);
            }
        }
        let head_dim = self.shape.head_dim;
        for row in 0..rows {
            let (token, head) = (
                self.tokens.start + row / group,
                self.heads.start + row % group,
            );
            // SAFETY: every unit has its own tokens and heads.
            let out = unsafe {
                self.out
                    .range((token * self.shape.num_heads + head) * head_dim, head_dim)
            };
            for (d, out) in out.iter_mut().enumerate() {
                *out = values[d * ROWS + row] / sums[row];
            }
        }
    }
}

/// `scores[key][row] = keys[key] · queries[.][row]`.
#[inline(always)]
unsafe fn score<S: Simd>(
    keys: &[*const f32; BLOCK],
    queries: &[f32],
    dim: usize,
    scores: &mut [f32],
) {
    for j in (0..BLOCK).step_by(TILE) {
        for c in (0..ROWS).step_by(COLUMN_VECTORS * S::LANES) {
            // SAFETY: inside the buffers, see the caller.
            unsafe {
                let mut acc = [[S::splat(0.0); COLUMN_VECTORS]; TILE];
                for d in 0..dim {
                    let q = queries.as_ptr().add(d * ROWS + c);
                    let mut column = [S::splat(0.0); COLUMN_VECTORS];
                    for (v, x) in column.iter_mut().enumerate() {
                        *x = S::load(q.add(v * S::LANES));
                    }
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let k = S::splat(*keys[j + t].add(d));
                        for (acc, &x) in acc.iter_mut().zip(&column) {
                            *acc = S::fma(k, x, *acc);
                        }
                    }
                }
                for (t, acc) in acc.iter().enumerate() {
                    for (v, &acc) in acc.iter().enumerate() {
                        S::store(
                            scores.as_mut_ptr().add((j + t) * ROWS + c + v * S::LANES),
                            acc,
                        );
                    }
                }
            }
        }
    }
}

/// Makes scores of keys at or past a row's limit minus infinity.
#[inline(always)]
unsafe fn mask_future<S: Simd>(limits: &[f32; ROWS], block: usize, scores: &mut [f32]) {
    for j in 0..BLOCK {
        for c in (0..ROWS).step_by(S::LANES) {
            // SAFETY: inside the buffers, see the caller.
            unsafe {
                let s = scores.as_mut_ptr().add(j * ROWS + c);
                let position = S::splat((block + j) as f32);
                S::store(
                    s,
                    S::select_less(
                        position,
                        S::load(limits.as_ptr().add(c)),
                        S::load(s),
                        S::splat(NO_SCORE),
                    ),
                );
            }
        }
    }
}

/// Scores to weights under the running maxima; rescales the values summed under the old ones.
#[inline(always)]
unsafe fn online_softmax<S: Simd>(
    scores: &mut [f32],
    maxima: &mut [f32; ROWS],
    sums: &mut [f32; ROWS],
    values: &mut [f32],
) {
    for c in (0..ROWS).step_by(S::LANES) {
        // SAFETY: inside the buffers, see the caller.
        unsafe {
            let column = scores.as_mut_ptr().add(c);
            let old = S::load(maxima.as_ptr().add(c));
            let mut top = old;
            for j in 0..BLOCK {
                top = S::max(top, S::load(column.add(j * ROWS)));
            }
            // The first block holds position 0, which every row sees, so `top` is finite from the start.
            let scale = S::exp(S::sub(old, top));
            let mut sum = S::mul(S::load(sums.as_ptr().add(c)), scale);
            for j in 0..BLOCK {
                let weight = S::exp(S::sub(S::load(column.add(j * ROWS)), top));
                S::store(column.add(j * ROWS), weight);
                sum = S::add(sum, weight);
            }
            S::store(sums.as_mut_ptr().add(c), sum);
            S::store(maxima.as_mut_ptr().add(c), top);
            for d in 0..values.len() / ROWS {
                let v = values.as_mut_ptr().add(d * ROWS + c);
                S::store(v, S::mul(S::load(v), scale));
            }
        }
    }
}

/// `values[d][row] += Σ_key V[key][d] · weights[key][row]`.
#[inline(always)]
unsafe fn add_values<S: Simd>(
    keys: &[*const f32; BLOCK],
    weights: &[f32],
    dim: usize,
    values: &mut [f32],
) {
    for d in (0..dim).step_by(TILE) {
        for c in (0..ROWS).step_by(COLUMN_VECTORS * S::LANES) {
            // SAFETY: inside the buffers, see the caller.
            unsafe {
                let mut acc = [[S::splat(0.0); COLUMN_VECTORS]; TILE];
                for (t, acc) in acc.iter_mut().enumerate() {
                    for (v, acc) in acc.iter_mut().enumerate() {
                        *acc = S::load(values.as_ptr().add((d + t) * ROWS + c + v * S::LANES));
                    }
                }
                for (j, key) in keys.iter().enumerate() {
                    let w = weights.as_ptr().add(j * ROWS + c);
                    let mut column = [S::splat(0.0); COLUMN_VECTORS];
                    for (v, x) in column.iter_mut().enumerate() {
                        *x = S::load(w.add(v * S::LANES));
                    }
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let value = S::splat(*key.add(dim + d + t));
                        for (acc, &x) in acc.iter_mut().zip(&column) {
                            *acc = S::fma(value, x, *acc);
                        }
                    }
                }
                for (t, acc) in acc.iter().enumerate() {
                    for (v, &acc) in acc.iter().enumerate() {
                        S::store(
                            values.as_mut_ptr().add((d + t) * ROWS + c + v * S::LANES),
                            acc,
                        );
                    }
                }
            }
        }
    }
}
