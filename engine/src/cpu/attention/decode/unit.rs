//! One unit of decode attention: the partial softmax of a KV head's rows over one chunk of keys.
//!
//! Three passes: all rows are scored against the chunk's keys, the scores become weights under the chunk's maximum, the
//! chunk's values are summed by them. Keys and values go by blocks of [`BLOCK`]; while one block is worked on, a later
//! one's entries are asked for. A row's sums run over dimensions and keys in one fixed order, whatever rows there are
//! beside it.

use super::super::NO_SCORE;
use super::{CHUNK, Keys};
use crate::cpu::kv_store::LayerKv;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::{Element, Kernel, Simd};

/// Keys that rows are scored against, and values that they sum, at a time.
const BLOCK: usize = 32;
/// How many blocks ahead entries are asked for; two were slower (bench/serve/service.md).
const DISTANCE: usize = 1;
/// Most rows worked on together: they share every key and value they load.
const ROW_GROUP: usize = 4;
const _: () = assert!(CHUNK.is_multiple_of(BLOCK));

/// The entries that one KV head reads, addressed by key index.
#[derive(Clone, Copy)]
pub(super) struct Entries<'a, E> {
    pub(super) kv: LayerKv<E>,
    pub(super) blocks: &'a [u32],
    pub(super) keys: Keys<'a>,
    pub(super) kv_head: usize,
}

/// Partial softmax of one unit.
pub(super) struct UnitKernel<'a, E> {
    pub(super) entries: Entries<'a, E>,
    pub(super) group: usize,
    pub(super) num_heads: usize,
    pub(super) q: &'a [f32],
    pub(super) first_key: usize,
    pub(super) num_keys: usize,
    /// `[rows]` maxima, `[rows]` sums, `[rows, padded_dim]` values.
    pub(super) partial: &'a mut [f32],
    /// Takes the weights under the unit's maxima: `[rows, CHUNK]`.
    pub(super) weights: &'a mut [f32],
}

impl<E: Element> Kernel for UnitKernel<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let entries = self.entries;
        let dim = entries.kv.padded_dim;
        let tokens = entries.keys.tokens;
        let rows = tokens * self.group;
        let (maxima, rest) = self.partial.split_at_mut(rows);
        let (sums, values) = rest.split_at_mut(rows);
        values.fill(0.0);
        let weights = &mut self.weights[..rows * CHUNK];
        let num_keys = self.num_keys;
        let width = num_keys.next_multiple_of(BLOCK);
        let mut chunk = Chunk::new(&entries, self.first_key, num_keys);
        // SAFETY: for the whole block: entries lie inside the store; vectors of LANES divide `dim`, which is padded to 16;
        // `weights` holds CHUNK, `values` `dim` floats per row.
        unsafe {
            for first in (0..width).step_by(BLOCK) {
                let keys = chunk.block::<S>(first);
                let mut ahead = chunk.ahead(first, score_tiles(rows));
                let mut row = 0;
                while row < rows {
                    let group = row_group(rows - row);
                    let mut q = [std::ptr::null::<f32>(); ROW_GROUP];
                    for (r, q) in q.iter_mut().enumerate().take(group) {
                        let (token, in_group) = ((row + r) / self.group, (row + r) % self.group);
                        let head = entries.kv_head * self.group + in_group;
                        *q = self.q.as_ptr().add((token * self.num_heads + head) * dim);
                    }
                    let out = weights.as_mut_ptr().add(row * CHUNK + first);
                    match group {
                        1 => score::<S, E, 1, 16>(&q, &keys, dim, out, &mut ahead),
                        2 => score::<S, E, 2, 8>(&q, &keys, dim, out, &mut ahead),
                        _ => score::<S, E, 4, 4>(&q, &keys, dim, out, &mut ahead),
                    }
                    row += group;
                }
            }
            let cached = entries.keys.cached();
            for row in 0..rows {
                let weights = &mut weights[row * CHUNK..][..width];
                // Causality among the step's own tokens, and the padding of the last block.
                let limit = cached + row / self.group + 1;
                let visible = limit.saturating_sub(self.first_key).min(num_keys);
                weights[visible..].fill(NO_SCORE);
                (maxima[row], sums[row]) = to_weights::<S>(weights);
            }
            chunk.side = Side::Values;
            for first in (0..width).step_by(BLOCK) {
                let block = chunk.block::<S>(first);
                let mut ahead = chunk.ahead(first, rows.div_ceil(ROW_GROUP) * VALUE_ASKS);
                let mut row = 0;
                while row < rows {
                    let w = weights.as_ptr().add(row * CHUNK + first);
                    let o = values.as_mut_ptr().add(row * dim);
                    row += match rows - row {
                        1 => add_values::<S, E, 1>(w, &block, dim, o, &mut ahead),
                        2 => add_values::<S, E, 2>(w, &block, dim, o, &mut ahead),
                        3 | 5 => add_values::<S, E, 3>(w, &block, dim, o, &mut ahead),
                        _ => add_values::<S, E, 4>(w, &block, dim, o, &mut ahead),
                    };
                }
            }
        }
    }
}

/// Which half of its entries a chunk is read for.
#[derive(Clone, Copy)]
enum Side {
    Keys,
    Values,
}

/// A unit's entries: the keys, then the values, block by block, as f32.
struct Chunk<E> {
    /// Where each entry begins; past the last key the last one again, whose score is masked.
    pointers: [*const E; CHUNK],
    /// Entries, whole blocks.
    padded: usize,
    dim: usize,
    side: Side,
    /// A block of half-precision entries widened once, not once per row; f32 entries are read in place.
    wide: Option<Scratch>,
}

impl<E: Element> Chunk<E> {
    #[inline(always)]
    fn new(entries: &Entries<'_, E>, first_key: usize, num_keys: usize) -> Self {
        let mut pointers = [std::ptr::null::<E>(); CHUNK];
        let padded = num_keys.next_multiple_of(BLOCK);
        for (index, pointer) in pointers[..padded].iter_mut().enumerate() {
            let position = entries.keys.position(first_key + index.min(num_keys - 1));
            *pointer = entries.kv.entry(entries.blocks, position, entries.kv_head);
        }
        let dim = entries.kv.padded_dim;
        let widen = size_of::<E>() != size_of::<f32>();
        Self {
            pointers,
            padded,
            dim,
            side: Side::Keys,
            wide: widen.then(|| Scratch::take(BLOCK * dim)),
        }
    }

    /// Elements from an entry's beginning to the half that is read: V follows K.
    #[inline(always)]
    fn offset(&self, side: Side) -> usize {
        match side {
            Side::Keys => 0,
            Side::Values => self.dim,
        }
    }

    /// The block that begins with key `first` of the unit: addresses of `dim` floats each.
    #[inline(always)]
    unsafe fn block<S: Simd>(&mut self, first: usize) -> [*const f32; BLOCK] {
        let mut block = [std::ptr::null::<f32>(); BLOCK];
        let offset = self.offset(self.side);
        let from = &self.pointers[first..first + BLOCK];
        match &mut self.wide {
            None => {
                for (to, from) in block.iter_mut().zip(from) {
                    *to = from.wrapping_add(offset).cast();
                }
            }
            Some(wide) => {
                for (j, to) in block.iter_mut().enumerate() {
                    // SAFETY: `wide` holds BLOCK × dim floats, half an entry `dim` elements, a multiple of LANES.
                    unsafe {
                        let row = wide.as_mut_ptr().add(j * self.dim);
                        for d in (0..self.dim).step_by(S::LANES) {
                            S::store(row.add(d), E::load::<S>(from[j].add(offset + d)));
                        }
                        *to = row;
                    }
                }
            }
        }
        block
    }

    /// What to ask for while the block at `first` is worked on in `steps` steps: the block DISTANCE later, where the
    /// first values follow the last keys.
    #[inline(always)]
    fn ahead(&self, first: usize, steps: usize) -> Ahead<'_, E> {
        let later = first + DISTANCE * BLOCK;
        let (side, at) = match self.side {
            Side::Keys if later < self.padded => (Side::Keys, later),
            Side::Keys => (Side::Values, (later - self.padded).min(self.padded)),
            Side::Values => (Side::Values, later.min(self.padded)),
        };
        Ahead {
            coming: &self.pointers[at..(at + BLOCK).min(self.padded)],
            offset: self.offset(side) * size_of::<E>(),
            bytes: self.dim * size_of::<E>(),
            per_step: BLOCK.div_ceil(steps),
        }
    }
}

/// A later block's entries, asked for a few at a time. All at once they would fill the miss buffers, hold up the
/// arithmetic, and leave memory idle for the rest of the block.
struct Ahead<'a, E> {
    coming: &'a [*const E],
    /// Bytes from an entry's beginning to the half asked for.
    offset: usize,
    /// Bytes of that half.
    bytes: usize,
    /// Entries asked for per step.
    per_step: usize,
}

impl<E> Ahead<'_, E> {
    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self) {
        let (now, later) = self.coming.split_at(self.per_step.min(self.coming.len()));
        self.coming = later;
        for entry in now {
            let half = entry.cast::<u8>().wrapping_add(self.offset);
            for line in (0..self.bytes).step_by(64) {
                // SAFETY: prefetches may name any address.
                unsafe { S::prefetch(half.wrapping_add(line)) };
            }
        }
    }
}

/// How many of `left` rows to score together: 4, 2 or 1.
#[inline(always)]
fn row_group(left: usize) -> usize {
    match left {
        1 => 1,
        2 | 3 => 2,
        _ => ROW_GROUP,
    }
}

/// Tiles of 16 scores in a block.
#[inline(always)]
fn score_tiles(rows: usize) -> usize {
    rows * BLOCK / 16
}

/// `out[row][key] = q[row] · keys[key]` for `ROWS` rows and a block of keys, `KEYS` at a time; rows are `CHUNK` apart.
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
            ahead.ask::<S>();
            let mut acc = [S::splat(0.0); 16];
            let mut key = [std::ptr::null::<f32>(); KEYS];
            key.copy_from_slice(&keys[first..first + KEYS]);
            for d in (0..dim).step_by(S::LANES) {
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
                let to = out.add(r * CHUNK + first);
                std::ptr::copy_nonoverlapping(sums.as_ptr().add(r * KEYS), to, KEYS);
            }
        }
    }
}

/// Turns a row's scores, a multiple of LANES, into weights e^(score - maximum); gives the maximum and the weights' sum.
#[inline(always)]
unsafe fn to_weights<S: Simd>(scores: &mut [f32]) -> (f32, f32) {
    // SAFETY: whole vectors of the slice.
    unsafe {
        let mut top = S::splat(NO_SCORE);
        for s in scores.chunks_exact(S::LANES) {
            top = S::max(top, S::load(s.as_ptr()));
        }
        let maximum = S::reduce_max(top);
        if maximum == NO_SCORE {
            // Nothing of this unit is visible to the row.
            scores.fill(0.0);
            return (NO_SCORE, 0.0);
        }
        let m = S::splat(maximum);
        let mut total = S::splat(0.0);
        for s in scores.chunks_exact_mut(S::LANES) {
            let w = S::exp(S::sub(S::load(s.as_ptr()), m));
            S::store(s.as_mut_ptr(), w);
            total = S::add(total, w);
        }
        (maximum, S::reduce_add(total))
    }
}

/// Values summed between two requests for entries of the next block.
const VALUES_PER_ASK: usize = 8;
/// Requests while a row group sums a block.
const VALUE_ASKS: usize = BLOCK / VALUES_PER_ASK;

/// `values[r] += Σ_j weights[r][j] · V[j]` for `ROWS` rows and a block of values; returns `ROWS`.
#[inline(always)]
unsafe fn add_values<S: Simd, E, const ROWS: usize>(
    weights: *const f32,
    block: &[*const f32; BLOCK],
    dim: usize,
    values: *mut f32,
    ahead: &mut Ahead<'_, E>,
) -> usize {
    // SAFETY: the caller passes ROWS × BLOCK weights, rows CHUNK apart, BLOCK values of `dim` floats and ROWS × dim sums.
    unsafe {
        let mut d = 0;
        while d < dim {
            // As many vectors of a row at a time as the register file holds sums for.
            if S::LANES == 16 && dim - d >= 4 * S::LANES {
                add_columns::<S, E, ROWS, 4>(weights, block, d, values.add(d), dim, ahead);
                d += 4 * S::LANES;
            } else if dim - d >= 2 * S::LANES {
                add_columns::<S, E, ROWS, 2>(weights, block, d, values.add(d), dim, ahead);
                d += 2 * S::LANES;
            } else {
                add_columns::<S, E, ROWS, 1>(weights, block, d, values.add(d), dim, ahead);
                d += S::LANES;
            }
        }
    }
    ROWS
}

/// The same for `VECTORS` vectors from dimension `d` on; sums of rows are `dim` apart.
#[inline(always)]
unsafe fn add_columns<S: Simd, E, const ROWS: usize, const VECTORS: usize>(
    weights: *const f32,
    block: &[*const f32; BLOCK],
    d: usize,
    sums: *mut f32,
    dim: usize,
    ahead: &mut Ahead<'_, E>,
) {
    // SAFETY: as in `add_values`; `d + VECTORS * LANES <= dim`.
    unsafe {
        let mut acc = [[S::splat(0.0); VECTORS]; ROWS];
        for (r, acc) in acc.iter_mut().enumerate() {
            for (v, acc) in acc.iter_mut().enumerate() {
                *acc = S::load(sums.add(r * dim + v * S::LANES));
            }
        }
        for first in (0..BLOCK).step_by(VALUES_PER_ASK) {
            ahead.ask::<S>();
            for (j, value) in block[first..first + VALUES_PER_ASK].iter().enumerate() {
                let mut row = [S::splat(0.0); VECTORS];
                for (v, x) in row.iter_mut().enumerate() {
                    *x = S::load(value.add(d + v * S::LANES));
                }
                for (r, acc) in acc.iter_mut().enumerate() {
                    let w = S::splat(*weights.add(r * CHUNK + first + j));
                    for (acc, &x) in acc.iter_mut().zip(&row) {
                        *acc = S::fma(w, x, *acc);
                    }
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            for (v, &acc) in acc.iter().enumerate() {
                S::store(sums.add(r * dim + v * S::LANES), acc);
            }
        }
    }
}
