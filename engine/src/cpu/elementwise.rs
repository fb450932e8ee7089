//! Work per row that is no product: norms, rotary embedding, storing K and V.

use super::kv_store::LayerKv;
use super::pool::{Pool, SharedSlice};
use super::simd::{Element, Isa, Kernel, Simd};
use super::span_of;
use crate::backend::{AttentionShape, Pass};

/// Rows worth a chunk of their own on the pool.
const ROWS_PER_CHUNK: usize = 16;

/// Calls `body(row)` for all rows: here when they are few, on the pool when they are many.
fn for_rows(pool: &Pool, rows: usize, body: &(dyn Fn(std::ops::Range<usize>) + Sync)) {
    pool.run(rows.div_ceil(ROWS_PER_CHUNK), &|chunk| {
        let first = chunk * ROWS_PER_CHUNK;
        body(first..(first + ROWS_PER_CHUNK).min(rows));
    });
}

/// `out[row] = x[row] / √(mean(x[row]²) + eps) ⊙ weight`.
pub(super) fn rms_norm(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    let out = SharedSlice::new(out);
    for_rows(pool, x.len() / width, &|rows| {
        // SAFETY: every chunk has its own rows.
        let out = unsafe { out.range(rows.start * width, rows.len() * width) };
        isa.run(NormKernel {
            x: &x[rows.start * width..rows.end * width],
            weight,
            eps,
            out,
        });
    });
}

struct NormKernel<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for NormKernel<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            out.copy_from_slice(x);
            // SAFETY: inside the instruction set of this kernel.
            unsafe { norm_in_place::<S>(out, self.weight, self.eps) };
        }
    }
}

/// Norms one row.
#[inline(always)]
unsafe fn norm_in_place<S: Simd>(x: &mut [f32], weight: &[f32], eps: f32) {
    let whole = x.len() - x.len() % S::LANES;
    // SAFETY: whole vectors of slices of equal length.
    unsafe {
        let mut squares = S::splat(0.0);
        for i in (0..whole).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(i));
            squares = S::fma(v, v, squares);
        }
        let mut sum = S::reduce_add(squares);
        for &v in &x[whole..] {
            sum += v * v;
        }
        let scale = 1.0 / (sum / x.len() as f32 + eps).sqrt();
        let s = S::splat(scale);
        for i in (0..whole).step_by(S::LANES) {
            let p = x.as_mut_ptr().add(i);
            S::store(
                p,
                S::mul(S::mul(S::load(p), s), S::load(weight.as_ptr().add(i))),
            );
        }
        for i in whole..x.len() {
            x[i] *= scale * weight[i];
        }
    }
}

/// Splits projected rows into queries, keys and values, rotates (Su et al. 2021, half-rotation layout) and stores.
pub(super) struct RotateAndStore<'a, E> {
    /// `[rows, (num_heads + 2 · num_kv_heads) · head_dim]`.
    pub(super) qkv: &'a [f32],
    /// `[rows, head_dim]`: cosines, then sines.
    pub(super) angles: &'a [f32],
    pub(super) shape: AttentionShape,
    /// Norm weights of q and k heads, and their epsilon.
    pub(super) norm: Option<(&'a [f32], &'a [f32], f32)>,
    pub(super) kv: LayerKv<E>,
    pub(super) pass: &'a Pass<'a>,
    /// `[rows, num_heads, padded_dim]`.
    pub(super) q: &'a mut [f32],
}

impl<E: Element> RotateAndStore<'_, E> {
    pub(super) fn run(self, isa: Isa, pool: &Pool) {
        let q_width = self.shape.num_heads * self.kv.padded_dim;
        let rows = self.pass.tokens.len();
        let q = SharedSlice::new(self.q);
        for_rows(pool, rows, &|rows| {
            // SAFETY: every chunk has its own rows.
            let q = unsafe { q.range(rows.start * q_width, rows.len() * q_width) };
            isa.run(RotateKernel {
                rows,
                qkv: self.qkv,
                angles: self.angles,
                shape: self.shape,
                norm: self.norm,
                kv: self.kv,
                pass: self.pass,
                q,
            });
        });
    }
}

struct RotateKernel<'a, E> {
    rows: std::ops::Range<usize>,
    qkv: &'a [f32],
    angles: &'a [f32],
    shape: AttentionShape,
    norm: Option<(&'a [f32], &'a [f32], f32)>,
    kv: LayerKv<E>,
    pass: &'a Pass<'a>,
    q: &'a mut [f32],
}

impl<E: Element> Kernel for RotateKernel<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let AttentionShape {
            num_heads,
            num_kv_heads,
            head_dim,
        } = self.shape;
        let padded = self.kv.padded_dim;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let first = self.rows.start;
        // A head, padded with zeros.
        let mut head = super::memory::Scratch::take(padded);
        head[head_dim..].fill(0.0);
        for row in self.rows {
            let input = &self.qkv[row * width..(row + 1) * width];
            let angles = &self.angles[row * head_dim..(row + 1) * head_dim];
            let span = span_of(self.pass, row);
            let position = self.pass.positions[row] as usize;
            for (index, x) in input.chunks_exact(head_dim).enumerate() {
                head[..head_dim].copy_from_slice(x);
                if index < num_heads + num_kv_heads {
                    let is_query = index < num_heads;
                    if let Some((qn, kn, eps)) = self.norm {
                        let weight = if is_query { qn } else { kn };
                        // SAFETY: inside the instruction set of this kernel.
                        unsafe { norm_in_place::<S>(&mut head[..head_dim], weight, eps) };
                    }
                    rotate(
                        &mut head[..head_dim],
                        angles,
                        if is_query { scale } else { 1.0 },
                    );
                }
                if index < num_heads {
                    self.q[((row - first) * num_heads + index) * padded..][..padded]
                        .copy_from_slice(&head);
                    continue;
                }
                let kv_head = (index - num_heads) % num_kv_heads;
                let value = index >= num_heads + num_kv_heads;
                // SAFETY: the entry is this row's own; nobody reads it before this pass's attention.
                unsafe {
                    let entry = self.kv.entry(span.blocks, position, kv_head).add(if value {
                        padded
                    } else {
                        0
                    });
                    for d in (0..padded).step_by(S::LANES) {
                        E::store::<S>(entry.add(d), S::load(head.as_ptr().add(d)));
                    }
                }
            }
        }
    }
}

/// Rotates one head: dimension i turns with i + head_dim/2.
#[inline(always)]
fn rotate(head: &mut [f32], angles: &[f32], scale: f32) {
    let half = head.len() / 2;
    let (a, b) = head.split_at_mut(half);
    let (cos, sin) = angles.split_at(half);
    for i in 0..half {
        let (x, y) = (a[i], b[i]);
        a[i] = (x * cos[i] - y * sin[i]) * scale;
        b[i] = (y * cos[i] + x * sin[i]) * scale;
    }
}
