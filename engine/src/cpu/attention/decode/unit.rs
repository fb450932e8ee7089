//! One unit of decode attention: the partial softmax of a KV head's rows over one chunk of keys.
//!
//! Keys go by blocks of [`BLOCK`]: all rows are scored against a block, the scores become weights under the running
//! maximum (Milakov and Gimelshein 2018), then the block's values are summed by them.

use super::super::NO_SCORE;
use super::{CHUNK, Keys};
use crate::cpu::kv_store::LayerKv;
use crate::cpu::memory::Scratch;
use crate::cpu::pool::SharedSlice;
use crate::cpu::simd::{Element, Kernel, Simd};

/// Keys scored before their values are summed: the scores of a block stay in the first-level cache.
const BLOCK: usize = 32;
/// Rows scored together: they share every key they load.
const ROW_GROUP: usize = 4;

/// The entries that one KV head reads, addressed by key index.
#[derive(Clone, Copy)]
pub(super) struct Entries<'a, E> {
    pub(super) kv: LayerKv<E>,
    pub(super) blocks: &'a [u32],
    pub(super) keys: Keys<'a>,
    pub(super) kv_head: usize,
}

impl<E> Entries<'_, E> {
    /// Addresses of a block of keys; past `last` the last key again (its score is masked).
    #[inline(always)]
    fn gather(&self, block: usize, last: usize, out: &mut [*const E; BLOCK]) {
        for (j, p) in out.iter_mut().enumerate() {
            let index = (block + j).min(last - 1);
            *p = self
                .kv
                .entry(self.blocks, self.keys.position(index), self.kv_head);
        }
    }
}

/// Partial softmax of one unit.
pub(super) struct UnitKernel<'a, E> {
    pub(super) entries: Entries<'a, E>,
    pub(super) group: usize,
    pub(super) num_heads: usize,
    pub(super) q: &'a [f32],
    pub(super) first_key: usize,
    pub(super) num_keys: usize,
    pub(super) partial: &'a mut [f32],
    /// Takes the scores, `[rows, CHUNK]`, where masses are wanted; else empty.
    pub(super) scores: &'a mut [f32],
    pub(super) capture: Option<(SharedSlice<f32>, usize)>,
}

impl<E: Element> Kernel for UnitKernel<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let entries = self.entries;
        let dim = entries.kv.padded_dim;
        let tokens = entries.keys.tokens;
        let rows = tokens * self.group;
        let cached = entries.keys.cached();
        let (maxima, rest) = self.partial.split_at_mut(rows);
        let (sums, values) = rest.split_at_mut(rows);
        maxima.fill(NO_SCORE);
        sums.fill(0.0);
        values.fill(0.0);
        let mut scores = Scratch::take(rows * BLOCK);
        // Half-precision entries are widened once per block, not once per row; f32 entries are read in place.
        let widen = size_of::<E>() != size_of::<f32>();
        let mut wide = Scratch::take(if widen { 2 * BLOCK * dim } else { 0 });
        let last = self.first_key + self.num_keys;
        let split_row = |row: usize| {
            (
                row / self.group,
                entries.kv_head * self.group + row % self.group,
            )
        };
        // SAFETY: for the whole block: entries come from the block table and lie inside the store; vectors of LANES divide
        // `dim`, which is padded to 16; scratch and partial sizes are those computed above.
        unsafe {
            let mut current = [std::ptr::null::<E>(); BLOCK];
            let mut next = [std::ptr::null::<E>(); BLOCK];
            entries.gather(self.first_key, last, &mut next);
            for block in (self.first_key..last).step_by(BLOCK) {
                current.copy_from_slice(&next);
                if block + BLOCK < last {
                    entries.gather(block + BLOCK, last, &mut next);
                }
                let mut keys = [std::ptr::null::<f32>(); BLOCK];
                for (j, key) in keys.iter_mut().enumerate() {
                    *key = if widen {
                        let to = wide.as_mut_ptr().add(j * 2 * dim);
                        for d in (0..2 * dim).step_by(S::LANES) {
                            S::store(to.add(d), E::load::<S>(current[j].add(d)));
                        }
                        to
                    } else {
                        current[j].cast()
                    };
                }
                let coming = if block + BLOCK < last { &next[..] } else { &[] };
                let mut ahead = Ahead::new(coming, dim, rows, dim / S::LANES);
                let mut row = 0;
                while row < rows {
                    let group = row_group(rows - row);
                    let mut q = [std::ptr::null::<f32>(); ROW_GROUP];
                    for (r, q) in q.iter_mut().enumerate().take(group) {
                        let (token, head) = split_row(row + r);
                        *q = self.q.as_ptr().add((token * self.num_heads + head) * dim);
                    }
                    let s = scores.as_mut_ptr().add(row * BLOCK);
                    match group {
                        1 => score::<S, E, 1, 16>(&q, &keys, dim, s, &mut ahead),
                        2 => score::<S, E, 2, 8>(&q, &keys, dim, s, &mut ahead),
                        _ => score::<S, E, 4, 4>(&q, &keys, dim, s, &mut ahead),
                    }
                    row += group;
                }
                for row in 0..rows {
                    let (token, head) = split_row(row);
                    let s = scores.as_mut_ptr().add(row * BLOCK);
                    // Causality among the step's own tokens, and the padding of the last block.
                    let limit = (cached + token + 1).min(last);
                    for j in limit.saturating_sub(block).min(BLOCK)..BLOCK {
                        s.add(j).write(NO_SCORE);
                    }
                    if let (Some((capture, kv_len)), true) = (&self.capture, token + 1 == tokens) {
                        for j in 0..BLOCK.min(last - block) {
                            capture
                                .set(head * kv_len + entries.keys.position(block + j), *s.add(j));
                        }
                    }
                    if !self.scores.is_empty() {
                        let to = row * CHUNK + block - self.first_key;
                        self.scores[to..to + BLOCK]
                            .copy_from_slice(std::slice::from_raw_parts(s, BLOCK));
                    }
                    online_softmax::<S>(
                        s,
                        &mut maxima[row],
                        &mut sums[row],
                        values.as_mut_ptr().add(row * dim),
                        dim,
                    );
                }
                let mut row = 0;
                while row < rows {
                    let s = scores.as_ptr().add(row * BLOCK);
                    let o = values.as_mut_ptr().add(row * dim);
                    row += match rows - row {
                        1 => add_values::<S, E, 1>(s, keys.as_ptr(), dim, o, &mut ahead),
                        2 => add_values::<S, E, 2>(s, keys.as_ptr(), dim, o, &mut ahead),
                        3 => add_values::<S, E, 3>(s, keys.as_ptr(), dim, o, &mut ahead),
                        4 => add_values::<S, E, 4>(s, keys.as_ptr(), dim, o, &mut ahead),
                        5 => add_values::<S, E, 3>(s, keys.as_ptr(), dim, o, &mut ahead),
                        _ => add_values::<S, E, 4>(s, keys.as_ptr(), dim, o, &mut ahead),
                    };
                }
            }
        }
    }
}

/// The next block's entries, asked for a cache line or two at a time while this block is worked on. All at once they
/// would fill the miss buffers, hold up the arithmetic, and leave memory idle for the rest of the block.
struct Ahead<'a, E> {
    entries: &'a [*const E],
    /// Bytes of an entry.
    bytes: usize,
    entry: usize,
    offset: usize,
    /// Lines to ask for per step of scoring (one vector of a tile) and of summing values (one key of a row group).
    per_score: usize,
    per_value: usize,
}

impl<'a, E> Ahead<'a, E> {
    /// Spreads the lines of `entries` over the work on `rows` rows: half over the scores, half over the values.
    fn new(entries: &'a [*const E], dim: usize, rows: usize, vectors: usize) -> Self {
        let bytes = 2 * dim * size_of::<E>();
        let half = entries.len() * bytes.div_ceil(64) / 2;
        // Tiles hold 16 scores; summing goes by groups of at most four rows.
        let score_steps = (rows * BLOCK / 16) * vectors;
        let value_steps = rows.div_ceil(ROW_GROUP) * BLOCK * vectors.div_ceil(4);
        let (per_score, per_value) = (half.div_ceil(score_steps), half.div_ceil(value_steps));
        Self {
            entries,
            bytes,
            entry: 0,
            offset: 0,
            per_score,
            per_value,
        }
    }

    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some(entry) = self.entries.get(self.entry) else {
                return;
            };
            // SAFETY: prefetches may name any address.
            unsafe { S::prefetch(entry.cast::<u8>().wrapping_add(self.offset)) };
            self.offset += 64;
            if self.offset >= self.bytes {
                (self.entry, self.offset) = (self.entry + 1, 0);
            }
        }
    }
}

/// How many of `left` rows to score together: 4, 2 or 1.
fn row_group(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 3 => 2,
        _ => ROW_GROUP,
    }
}

/// `out[row][key] = q[row] · keys[key]` for `ROWS` rows and a block of keys, `KEYS` at a time; rows are `BLOCK` apart.
/// `ROWS · KEYS` is 16: as many sums as one folding takes.
#[inline(always)]
unsafe fn score<S: Simd, E, const ROWS: usize, const KEYS: usize>(
    q: &[*const f32; ROW_GROUP],
    keys: &[*const f32; BLOCK],
    dim: usize,
    out: *mut f32,
    ahead: &mut Ahead<'_, E>,
) {
    const { assert!(ROWS * KEYS == 16) };
    for first in (0..BLOCK).step_by(KEYS) {
        // SAFETY: the caller passes ROWS queries and BLOCK keys of `dim` floats and room for ROWS × BLOCK scores.
        unsafe {
            let mut acc = [S::splat(0.0); 16];
            let mut key = [std::ptr::null::<f32>(); KEYS];
            key.copy_from_slice(&keys[first..first + KEYS]);
            for d in (0..dim).step_by(S::LANES) {
                ahead.ask::<S>(ahead.per_score);
                let mut query = [S::splat(0.0); ROWS];
                for (r, v) in query.iter_mut().enumerate() {
                    *v = S::load(q[r].add(d));
                }
                for (j, key) in key.iter().enumerate() {
                    let k = S::load(key.add(d));
                    for (r, &v) in query.iter().enumerate() {
                        acc[r * KEYS + j] = S::fma(v, k, acc[r * KEYS + j]);
                    }
                }
            }
            let mut sums = [0.0f32; 16];
            S::reduce_add16(&acc, sums.as_mut_ptr());
            for r in 0..ROWS {
                let to = out.add(r * BLOCK + first);
                std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * KEYS), to, KEYS);
            }
        }
    }
}

/// Turns a block of scores into weights under the running maximum, and rescales what was summed under the old one.
#[inline(always)]
unsafe fn online_softmax<S: Simd>(
    s: *mut f32,
    maximum: &mut f32,
    sum: &mut f32,
    values: *mut f32,
    dim: usize,
) {
    // SAFETY: `s` holds BLOCK scores, `values` `dim` floats.
    unsafe {
        let mut top = S::load(s);
        for j in (S::LANES..BLOCK).step_by(S::LANES) {
            top = S::max(top, S::load(s.add(j)));
        }
        let top = S::reduce_max(top);
        if top == NO_SCORE {
            // Nothing of this block is visible to the row.
            for j in (0..BLOCK).step_by(S::LANES) {
                S::store(s.add(j), S::splat(0.0));
            }
            return;
        }
        if top > *maximum {
            if *maximum != NO_SCORE {
                let scale = S::exp(S::splat(*maximum - top));
                for d in (0..dim).step_by(S::LANES) {
                    S::store(values.add(d), S::mul(S::load(values.add(d)), scale));
                }
                // All lanes of `scale` are equal: reduce_max picks one.
                *sum *= S::reduce_max(scale);
            }
            *maximum = top;
        }
        let m = S::splat(*maximum);
        let mut total = S::splat(0.0);
        for j in (0..BLOCK).step_by(S::LANES) {
            let w = S::exp(S::sub(S::load(s.add(j)), m));
            S::store(s.add(j), w);
            total = S::add(total, w);
        }
        *sum += S::reduce_add(total);
    }
}

/// `values[r] += Σ_j weights[r][j] · V[j]` for `ROWS` rows and a block of keys; returns `ROWS`.
#[inline(always)]
unsafe fn add_values<S: Simd, E, const ROWS: usize>(
    weights: *const f32,
    keys: *const *const f32,
    dim: usize,
    values: *mut f32,
    ahead: &mut Ahead<'_, E>,
) -> usize {
    // SAFETY: the caller passes ROWS × BLOCK weights, BLOCK entries of 2 · dim floats and ROWS × dim values.
    unsafe {
        let mut d = 0;
        while d < dim {
            // As many vectors of a row at a time as the register file holds sums for.
            if S::LANES == 16 && dim - d >= 4 * S::LANES {
                add_columns::<S, E, ROWS, 4>(weights, keys, dim, d, values, ahead);
                d += 4 * S::LANES;
            } else if dim - d >= 2 * S::LANES {
                add_columns::<S, E, ROWS, 2>(weights, keys, dim, d, values, ahead);
                d += 2 * S::LANES;
            } else {
                add_columns::<S, E, ROWS, 1>(weights, keys, dim, d, values, ahead);
                d += S::LANES;
            }
        }
    }
    ROWS
}

#[inline(always)]
unsafe fn add_columns<S: Simd, E, const ROWS: usize, const VECTORS: usize>(
    weights: *const f32,
    keys: *const *const f32,
    dim: usize,
    d: usize,
    values: *mut f32,
    ahead: &mut Ahead<'_, E>,
) {
    // SAFETY: as in `add_values`; `d + VECTORS * LANES <= dim`.
    unsafe {
        let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(values.add(r * dim + d + v * S::LANES));
            }
        }
        for j in 0..BLOCK {
            ahead.ask::<S>(ahead.per_value);
            let value = (*keys.add(j)).add(dim + d);
            let mut row = [S::splat(0.0); VECTORS];
            for (v, x) in row.iter_mut().enumerate() {
                *x = S::load(value.add(v * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let w = S::splat(*weights.add(r * BLOCK + j));
                for (acc, &x) in acc.iter_mut().zip(&row) {
                    *acc = S::fma(w, x, *acc);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                S::store(values.add(r * dim + d + v * S::LANES), acc);
            }
        }
    }
}
