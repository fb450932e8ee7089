//! [`SmallKernel`]: rows whose bits do not depend on the rows beside them.
//!
//! A row's sums run over the inputs in one fixed order: lane by lane through the whole vectors, the lanes folded by halves,
//! then what is left. How many rows and outputs are worked on together is free, since no sum mixes two of them: a tile
//! of rows and outputs keeps its sums in registers, so that every weight loaded and widened serves all rows of the tile.
//! Tried and left: widening a stretch's weights once for all tiles (twice the bytes cost more than the instructions saved), and
//! bf16 taken by even and odd places, an instruction less each (no faster: multiplying and adding is what there is to do).

use super::Job;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::{Element, Kernel, Simd};

/// Rows whose sums a stretch holds at a time.
const ROW_BLOCK: usize = 48;

/// Vectors whose lanes are folded at a time.
const FOLDED: usize = 16;

/// One stretch of outputs for all rows.
pub(super) struct SmallKernel<'a, W> {
    job: Job<'a>,
    stored: std::marker::PhantomData<W>,
}

impl<'a, W> SmallKernel<'a, W> {
    pub(super) fn new(job: Job<'a>) -> Self {
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
        let part_stride = ROW_BLOCK.min(job.rows) * len;
        let mut sums = Scratch::take(job.parts.len() * part_stride);
        // SAFETY: rows `first..first + len` of each matrix, rows of `x`, and the sums taken above.
        unsafe {
            for first_row in (0..job.rows).step_by(ROW_BLOCK) {
                let rows = ROW_BLOCK.min(job.rows - first_row);
                for (part, (weight, _)) in job.parts.iter().enumerate() {
                    let operands = Operands {
                        x: job.x.as_ptr().add(first_row * inputs),
                        inputs,
                        sums: sums.as_mut_ptr().add(part * part_stride),
                        outputs: len,
                    };
                    operands.multiply::<S, W>(weight.as_ptr::<W>().add(first * inputs), rows);
                }
                job.finish::<S>(&sums, len, part_stride, first_row, rows);
            }
        }
    }
}

/// What a stretch of outputs is computed from, the weights aside, and where it goes.
struct Operands {
    /// First input row.
    x: *const f32,
    inputs: usize,
    /// `[row][output]`.
    sums: *mut f32,
    outputs: usize,
}

impl Operands {
    /// All outputs of rows `0..rows`, in as few, even tiles as the register file allows.
    #[inline(always)]
    unsafe fn multiply<S: Simd, W: Element>(&self, w: *const W, rows: usize) {
        let tiles = rows.div_ceil(S::TILE_TOKENS);
        let mut row = 0;
        for tile in 0..tiles {
            let n = (rows - row).div_ceil(tiles - tile);
            // SAFETY: the caller's contract is the callee's. Sums fill the registers that weights and inputs
            // leave; stretches are multiples of 16, so few outputs are left over.
            unsafe {
                match n {
                    1 => self.tile::<S, W, 16, 1>(w, row),
                    2 => self.tile::<S, W, 8, 2>(w, row),
                    3 => self.tile::<S, W, 8, 3>(w, row),
                    4 => self.tile::<S, W, 4, 4>(w, row),
                    5 => self.tile::<S, W, 4, 5>(w, row),
                    6 => self.tile::<S, W, 4, 6>(w, row),
                    7 => self.tile::<S, W, 2, 7>(w, row),
                    8 => self.tile::<S, W, 2, 8>(w, row),
                    9 => self.tile::<S, W, 2, 9>(w, row),
                    10 => self.tile::<S, W, 2, 10>(w, row),
                    11 => self.tile::<S, W, 2, 11>(w, row),
                    _ => self.tile::<S, W, 2, 12>(w, row),
                }
            }
            row += n;
        }
    }

    /// All outputs of rows `row..row + R`, `M` at a time.
    #[inline(always)]
    unsafe fn tile<S: Simd, W: Element, const M: usize, const R: usize>(
        &self,
        w: *const W,
        row: usize,
    ) {
        // SAFETY: outputs `0..self.outputs` and the tile's rows exist.
        unsafe {
            let mut o = 0;
            while o + M <= self.outputs {
                self.block::<S, W, M, R>(w, row, o);
                o += M;
            }
            while o < self.outputs {
                self.block::<S, W, 1, R>(w, row, o);
                o += 1;
            }
        }
    }

    /// `M` outputs × `R` rows.
    #[inline(always)]
    unsafe fn block<S: Simd, W: Element, const M: usize, const R: usize>(
        &self,
        w: *const W,
        row: usize,
        output: usize,
    ) {
        const { assert!(M * R <= 2 * FOLDED) };
        let inputs = self.inputs;
        // SAFETY: the caller passes an output and row block inside the operands; the tail is read element by element.
        unsafe {
            let mut acc = [S::splat(0.0); 2 * FOLDED];
            let w = w.add(output * inputs);
            let x = self.x.add(row * inputs);
            let whole = inputs - inputs % S::LANES;
            let next = M * inputs;
            let mut k = 0;
            while k < whole {
                // The next block's weights: one line per 64 bytes.
                if (k * size_of::<W>()).is_multiple_of(64) {
                    for m in 0..M {
                        S::prefetch(w.wrapping_add(next + m * inputs + k).cast());
                    }
                }
                // Registers hold the sums and the fewer of inputs and weights.
                if R > 2 * M {
                    let mut weights = [S::splat(0.0); M];
                    for (m, weight) in weights.iter_mut().enumerate() {
                        *weight = W::load::<S>(w.add(m * inputs + k));
                    }
                    for r in 0..R {
                        let v = S::load(x.add(r * inputs + k));
                        for (m, &weight) in weights.iter().enumerate() {
                            acc[r * M + m] = S::fma(weight, v, acc[r * M + m]);
                        }
                    }
                } else {
                    let mut xs = [S::splat(0.0); R];
                    for (r, v) in xs.iter_mut().enumerate() {
                        *v = S::load(x.add(r * inputs + k));
                    }
                    for m in 0..M {
                        let weight = W::load::<S>(w.add(m * inputs + k));
                        for (r, &v) in xs.iter().enumerate() {
                            acc[r * M + m] = S::fma(weight, v, acc[r * M + m]);
                        }
                    }
                }
                k += S::LANES;
            }
            let mut sums = [0.0; 2 * FOLDED];
            let (one, other) = acc.split_at(FOLDED);
            if let Ok(one) = one.try_into() {
                S::reduce_add16(one, sums.as_mut_ptr());
            }
            if M * R > FOLDED
                && let Ok(other) = other.try_into()
            {
                S::reduce_add16(other, sums.as_mut_ptr().add(FOLDED));
            }
            for r in 0..R {
                let sums = sums.as_mut_ptr().add(r * M);
                for m in 0..M {
                    for k in whole..inputs {
                        *sums.add(m) += w.add(m * inputs + k).read_unaligned().to_f32()
                            * *x.add(r * inputs + k);
                    }
                }
                let to = self.sums.add((row + r) * self.outputs + output);
                std::ptr::copy_nonoverlapping(sums, to, M);
            }
        }
    }
}
