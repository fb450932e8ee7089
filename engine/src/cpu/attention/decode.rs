//! Attention of a few query rows: decoding, drafting and verification, dense or by index list.
//!
//! Work is cut into units of one KV head and [`CHUNK`] keys; every unit leaves a partial softmax (maximum, sum,
//! weighted values) per query row, and [`combine`] joins them in key order. Chunks are fixed in size, so neither the
//! number of threads nor the other rows change a row's bits.
//!
//! Rows of a unit: `row = token * group + head_in_group`, where `group` query heads share the KV head.

use super::NO_SCORE;
use crate::attention::HeadLists;
use crate::backend::AttentionShape;
use crate::cpu::kv_store::LayerKv;
use crate::cpu::memory::{Buffer, Scratch};
use crate::cpu::pool::{Pool, SharedSlice};
use crate::cpu::simd::{Element, Isa, Kernel, Simd};

/// Keys per unit of work.
const CHUNK: usize = 256;
/// Keys scored before their values are summed: the scores of a block stay in the first-level cache.
const BLOCK: usize = 32;
/// Rows scored together: they share every key they load.
const ROW_GROUP: usize = 4;

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
    /// The keys of KV head `kv_head` of layer `layer`.
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
}

/// Scratch memory that lives as long as the backend.
pub(crate) struct DecodeScratch {
    /// Per unit: `[rows]` maxima, `[rows]` sums, `[rows, padded_dim]` values.
    partials: Buffer,
}

impl DecodeScratch {
    pub(crate) fn new() -> Self {
        Self {
            partials: Buffer::new(),
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
        let kv_len = self.keys[0].past + tokens;
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
        let mut no_capture = [];
        let capturing = self.capture.is_some();
        let captured = self.capture.unwrap_or(&mut no_capture);
        let capture = SharedSlice::new(captured);
        pool.run(units.len(), &|index| {
            let unit = &units[index];
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
                capture: capturing.then_some((capture, kv_len)),
            });
        });
        isa.run(Combine {
            shape: self.shape,
            dim,
            tokens,
            units: &units,
            partials: &scratch.partials,
            out: self.out,
            capture: capturing.then_some((captured, kv_len, self.keys)),
        });
    }
}

/// The entries that one KV head reads, addressed by key index.
#[derive(Clone, Copy)]
struct Entries<'a, E> {
    kv: LayerKv<E>,
    blocks: &'a [u32],
    keys: Keys<'a>,
    kv_head: usize,
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
struct UnitKernel<'a, E> {
    entries: Entries<'a, E>,
    group: usize,
    num_heads: usize,
    q: &'a [f32],
    first_key: usize,
    num_keys: usize,
    partial: &'a mut [f32],
    capture: Option<(SharedSlice<f32>, usize)>,
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

/// Joins the partial softmaxes of all units into the output rows, and turns captured scores into probabilities.
struct Combine<'a> {
    shape: AttentionShape,
    dim: usize,
    tokens: usize,
    units: &'a [Unit],
    partials: &'a [f32],
    out: &'a mut [f32],
    capture: Option<(&'a mut [f32], usize, &'a [Keys<'a>])>,
}

impl Kernel for Combine<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
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
                let (token, head) = (row / group, kv_head * group + row % group);
                let out =
                    &mut self.out[(token * self.shape.num_heads + head) * head_dim..][..head_dim];
                for (out, &v) in out.iter_mut().zip(value.iter()) {
                    *out = v / sum;
                }
                if let (Some((capture, kv_len, keys)), true) =
                    (&mut self.capture, token + 1 == self.tokens)
                {
                    let row = &mut capture[head * *kv_len..][..*kv_len];
                    // SAFETY: inside the instruction set of this kernel.
                    unsafe { to_probabilities::<S>(row, keys[kv_head], top, sum) };
                }
            }
        }
    }
}

/// `row[position] = e^(score - top) / sum` at the positions that were read; others stay 0.
#[inline(always)]
unsafe fn to_probabilities<S: Simd>(row: &mut [f32], keys: Keys<'_>, top: f32, sum: f32) {
    // SAFETY: whole vectors of `row`, or a padded copy of its end.
    unsafe {
        let (m, scale) = (S::splat(top), S::splat(1.0 / sum));
        if keys.list.is_some() {
            for index in 0..keys.len() {
                let x = &mut row[keys.position(index)];
                *x = S::reduce_max(S::mul(S::exp(S::sub(S::splat(*x), m)), scale));
            }
            return;
        }
        let mut chunks = row.chunks_exact_mut(S::LANES);
        for chunk in &mut chunks {
            let p = chunk.as_mut_ptr();
            S::store(p, S::mul(S::exp(S::sub(S::load(p), m)), scale));
        }
        for x in chunks.into_remainder() {
            *x = S::reduce_max(S::mul(S::exp(S::sub(S::splat(*x), m)), scale));
        }
    }
}
