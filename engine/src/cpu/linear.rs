//! Projections: `out = x · Wᵀ + b`, weights in their stored type, sums in f32.
//!
//! The outputs are cut into stretches, one per task of the pool. [`SmallKernel`] computes a stretch so that a row's bits
//! do not depend on the other rows; [`BulkKernel`] is for prompt chunks (`bulk`), where they may.

mod bulk;
mod small;

use self::bulk::BulkKernel;
use self::small::SmallKernel;
use super::matrix::Matrix;
use super::pool::{Pool, SharedSlice};
use super::simd::{Isa, Simd};
use crate::backend::{DType, Epilogue};

/// Outputs per chunk of a bulk product.
const BULK_OUTPUTS: usize = 192;

/// One or more projections of the same input.
pub(super) struct Projection<'a> {
    /// `[rows, in]`.
    pub(super) x: &'a [f32],
    /// Weights and biases; see [`Epilogue`] for how several combine.
    pub(super) parts: &'a [(&'a Matrix, Option<&'a [f32]>)],
    pub(super) epilogue: Epilogue,
    /// `[rows, width]`.
    pub(super) out: &'a mut [f32],
}

/// A stretch of outputs: of one part, or of gate and up together.
struct Chunk {
    part: usize,
    first: usize,
    len: usize,
    /// Column of `out` that `first` goes to.
    column: usize,
}

impl Projection<'_> {
    fn inputs(&self) -> usize {
        self.parts[0].0.cols()
    }

    /// Floats per output row.
    pub(super) fn width(parts: &[(&Matrix, Option<&[f32]>)], epilogue: Epilogue) -> usize {
        match epilogue {
            Epilogue::Store | Epilogue::Add => parts.iter().map(|(w, _)| w.rows()).sum(),
            Epilogue::SwiGlu => parts[0].0.rows(),
        }
    }

    fn chunks(&self, outputs: usize) -> Vec<Chunk> {
        let distinct = if self.epilogue == Epilogue::SwiGlu {
            1
        } else {
            self.parts.len()
        };
        let mut column = 0;
        let mut chunks = Vec::new();
        for (part, (weight, _)) in self.parts[..distinct].iter().enumerate() {
            for first in (0..weight.rows()).step_by(outputs) {
                let len = outputs.min(weight.rows() - first);
                chunks.push(Chunk {
                    part,
                    first,
                    len,
                    column,
                });
                column += len;
            }
        }
        chunks
    }

    /// Computes `out` on all threads of the pool.
    pub(super) fn run(self, isa: Isa, pool: &Pool, bulk: bool) {
        let width = Self::width(self.parts, self.epilogue);
        let rows = self.x.len() / self.inputs();
        let chunks = if bulk {
            self.chunks(BULK_OUTPUTS)
        } else {
            // Enough chunks to share the work evenly, each long enough to be worth claiming.
            let share = (width / (pool.threads() * 8)).next_multiple_of(16);
            self.chunks(share.clamp(16, 128))
        };
        let out = SharedSlice::new(self.out);
        let (x, parts, epilogue) = (self.x, self.parts, self.epilogue);
        pool.run(chunks.len(), &|index| {
            let chunk = &chunks[index];
            let used = if epilogue == Epilogue::SwiGlu {
                parts
            } else {
                &parts[chunk.part..=chunk.part]
            };
            let job = Job {
                x,
                rows,
                parts: used,
                epilogue,
                chunk,
                out,
                width,
            };
            match (bulk, used[0].0.dtype()) {
                (true, DType::F32) => isa.run(BulkKernel::<f32>::new(job)),
                (true, DType::Bf16) => isa.run(BulkKernel::<half::bf16>::new(job)),
                (true, DType::F16) => isa.run(BulkKernel::<half::f16>::new(job)),
                (false, DType::F32) => isa.run(SmallKernel::<f32>::new(job)),
                (false, DType::Bf16) => isa.run(SmallKernel::<half::bf16>::new(job)),
                (false, DType::F16) => isa.run(SmallKernel::<half::f16>::new(job)),
            }
        });
    }
}

/// One chunk's work.
struct Job<'a> {
    x: &'a [f32],
    rows: usize,
    parts: &'a [(&'a Matrix, Option<&'a [f32]>)],
    epilogue: Epilogue,
    chunk: &'a Chunk,
    out: SharedSlice<f32>,
    width: usize,
}

impl Job<'_> {
    /// Applies bias and epilogue to the sums of rows `first_row..`: `sums[part][row][output]`, `stride` floats per row
    /// and `part_stride` per part.
    #[inline(always)]
    unsafe fn finish<S: Simd>(
        &self,
        sums: &[f32],
        stride: usize,
        part_stride: usize,
        first_row: usize,
        rows: usize,
    ) {
        let Chunk {
            first, len, column, ..
        } = *self.chunk;
        let bias = |part: usize, o: usize| self.parts[part].1.map_or(0.0, |b| b[first + o]);
        for row in 0..rows {
            // SAFETY: this chunk alone writes these columns.
            let out = unsafe { self.out.range((first_row + row) * self.width + column, len) };
            let sums_of = |part: usize| &sums[part * part_stride + row * stride..][..len];
            match self.epilogue {
                Epilogue::Store if self.parts[0].1.is_none() => out.copy_from_slice(sums_of(0)),
                Epilogue::Store => {
                    for (o, (out, s)) in out.iter_mut().zip(sums_of(0)).enumerate() {
                        *out = s + bias(0, o);
                    }
                }
                Epilogue::Add => {
                    for (o, (out, s)) in out.iter_mut().zip(sums_of(0)).enumerate() {
                        *out += s + bias(0, o);
                    }
                }
                Epilogue::SwiGlu => {
                    let (gate, up) = (sums_of(0), sums_of(1));
                    let mut o = 0;
                    // SAFETY: whole vectors of slices of `len` floats.
                    unsafe {
                        if self.parts.iter().all(|(_, b)| b.is_none()) {
                            while o + S::LANES <= len {
                                let g = S::load(gate.as_ptr().add(o));
                                let y = S::mul(silu::<S>(g), S::load(up.as_ptr().add(o)));
                                S::store(out.as_mut_ptr().add(o), y);
                                o += S::LANES;
                            }
                        }
                        for o in o..len {
                            let g = S::reduce_max(silu::<S>(S::splat(gate[o] + bias(0, o))));
                            out[o] = g * (up[o] + bias(1, o));
                        }
                    }
                }
            }
        }
    }
}

/// x · sigmoid(x).
#[inline(always)]
unsafe fn silu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic inside the caller's instruction set.
    unsafe {
        let one = S::splat(1.0);
        S::div(x, S::add(one, S::exp(S::sub(S::splat(0.0), x))))
    }
}
