//! Projections: `out = x · Wᵀ + b`, weights in their stored type, sums in f32.
//!
//! Few rows: [`SmallKernel`] reads every weight once, widens it in registers and multiplies it with up to
//! `TILE_TOKENS` rows; a row's sums run over the inputs in one fixed order, so their bits do not depend on the other
//! rows. Many rows (`bulk`): the weights of a stretch of outputs are widened once and the product is left to the `gemm`
//! library.

use super::matrix::Matrix;
use super::memory::Scratch;
use super::pool::{Pool, SharedSlice};
use super::simd::{Element, Isa, Kernel, Simd};
use crate::backend::{DType, Epilogue};

/// Rows whose sums one small-kernel chunk holds at a time.
const TOKEN_BLOCK: usize = 16;
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

/// A few rows.
struct SmallKernel<'a, W> {
    job: Job<'a>,
    stored: std::marker::PhantomData<W>,
}

impl<'a, W> SmallKernel<'a, W> {
    fn new(job: Job<'a>) -> Self {
        Self {
            job,
            stored: std::marker::PhantomData,
        }
    }
}

impl<W: Element> Kernel for SmallKernel<'_, W> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let job = &self.job;
        let inputs = job.parts[0].0.cols();
        let (first, len) = (job.chunk.first, job.chunk.len);
        let part_stride = TOKEN_BLOCK * len;
        let mut sums = Scratch::take(job.parts.len() * part_stride);
        for first_row in (0..job.rows).step_by(TOKEN_BLOCK) {
            let rows = TOKEN_BLOCK.min(job.rows - first_row);
            for (part, (weight, _)) in job.parts.iter().enumerate() {
                let w = weight.as_ptr::<W>();
                // SAFETY: rows `first..first + len` of the matrix, rows of `x` and the sums taken above.
                unsafe {
                    let tile = Tile {
                        w: w.add(first * inputs),
                        x: job.x.as_ptr().add(first_row * inputs),
                        inputs,
                        sums: sums.as_mut_ptr().add(part * part_stride),
                        stride: len,
                    };
                    // As few, even tiles of rows as the register file allows.
                    let tiles = rows.div_ceil(S::TILE_TOKENS);
                    let mut done = 0;
                    for t in 0..tiles {
                        let n = (rows - done).div_ceil(tiles - t);
                        tile.tokens::<S>(done, n, len);
                        done += n;
                    }
                }
            }
            // SAFETY: inside the instruction set of this kernel.
            unsafe { job.finish::<S>(&sums, len, part_stride, first_row, rows) };
        }
    }
}

/// Pointers of a tile's operands.
struct Tile<W> {
    /// First weight row.
    w: *const W,
    /// First input row.
    x: *const f32,
    inputs: usize,
    /// `[row][output]`.
    sums: *mut f32,
    stride: usize,
}

impl<W: Element> Tile<W> {
    /// All `outputs` for `n` rows from `row` on; `n` at most `TILE_TOKENS`.
    #[inline(always)]
    unsafe fn tokens<S: Simd>(&self, row: usize, n: usize, outputs: usize) {
        // SAFETY: the caller's contract is the callee's. Sixteen sums at a time suit the sixteen-fold reduction.
        unsafe {
            match n {
                1 => self.outputs::<S, 16, 1>(row, outputs),
                2 => self.outputs::<S, 8, 2>(row, outputs),
                3 => self.outputs::<S, 5, 3>(row, outputs),
                4 => self.outputs::<S, 4, 4>(row, outputs),
                _ => self.outputs::<S, 3, 5>(row, outputs),
            }
        }
    }

    #[inline(always)]
    unsafe fn outputs<S: Simd, const M: usize, const R: usize>(&self, row: usize, outputs: usize) {
        // SAFETY: outputs `0..outputs` and rows `row..row + R` exist.
        unsafe {
            let mut o = 0;
            while o + M <= outputs {
                self.block::<S, M, R>(row, o);
                o += M;
            }
            while o < outputs {
                self.block::<S, 1, R>(row, o);
                o += 1;
            }
        }
    }

    /// `M` outputs × `R` rows.
    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize, const R: usize>(&self, row: usize, output: usize) {
        const { assert!(M * R <= 16) };
        let inputs = self.inputs;
        // SAFETY: the caller passes an output and row block inside the operands; the tail is read element by element.
        unsafe {
            let mut acc = [S::splat(0.0); 16];
            let w = self.w.add(output * inputs);
            let x = self.x.add(row * inputs);
            let whole = inputs - inputs % S::LANES;
            let next = M * inputs;
            let mut k = 0;
            while k < whole {
                let mut xs = [S::splat(0.0); R];
                for (r, v) in xs.iter_mut().enumerate() {
                    *v = S::load(x.add(r * inputs + k));
                }
                for m in 0..M {
                    let at = w.add(m * inputs + k);
                    // The next block's weights: one line per 64 bytes.
                    if (k * size_of::<W>()).is_multiple_of(64) {
                        S::prefetch(at.wrapping_add(next).cast());
                    }
                    let weight = W::load::<S>(at);
                    for (r, &v) in xs.iter().enumerate() {
                        acc[m * R + r] = S::fma(weight, v, acc[m * R + r]);
                    }
                }
                k += S::LANES;
            }
            let mut sums = [0.0; 16];
            S::reduce_add16(&acc, sums.as_mut_ptr());
            for m in 0..M {
                for r in 0..R {
                    let mut sum = sums[m * R + r];
                    for k in whole..inputs {
                        sum += w.add(m * inputs + k).read_unaligned().to_f32()
                            * *x.add(r * inputs + k);
                    }
                    *self.sums.add((row + r) * self.stride + output + m) = sum;
                }
            }
        }
    }
}

/// Many rows.
struct BulkKernel<'a, W> {
    job: Job<'a>,
    stored: std::marker::PhantomData<W>,
}

impl<'a, W> BulkKernel<'a, W> {
    fn new(job: Job<'a>) -> Self {
        Self {
            job,
            stored: std::marker::PhantomData,
        }
    }
}

impl<W: Element> Kernel for BulkKernel<'_, W> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let job = &self.job;
        let inputs = job.parts[0].0.cols();
        let Chunk { first, len, .. } = *job.chunk;
        let part_stride = job.rows * len;
        let mut sums = Scratch::take(job.parts.len() * part_stride);
        let mut wide = Scratch::take(len * inputs);
        for (part, (weight, _)) in job.parts.iter().enumerate() {
            // SAFETY: rows `first..first + len` of the matrix; `wide` and `sums` have the sizes taken above.
            unsafe {
                let w = weight.as_ptr::<W>().add(first * inputs);
                let count = len * inputs;
                let whole = count - count % S::LANES;
                for i in (0..whole).step_by(S::LANES) {
                    S::store(wide.as_mut_ptr().add(i), W::load::<S>(w.add(i)));
                }
                for i in whole..count {
                    wide[i] = w.add(i).read_unaligned().to_f32();
                }
                gemm::gemm(
                    job.rows,
                    len,
                    inputs,
                    sums.as_mut_ptr().add(part * part_stride),
                    1,
                    len as isize,
                    false,
                    job.x.as_ptr(),
                    1,
                    inputs as isize,
                    wide.as_ptr(),
                    inputs as isize,
                    1,
                    0.0f32,
                    1.0f32,
                    false,
                    false,
                    false,
                    gemm::Parallelism::None,
                );
            }
        }
        // SAFETY: inside the instruction set of this kernel.
        unsafe { job.finish::<S>(&sums, len, part_stride, 0, job.rows) };
    }
}
