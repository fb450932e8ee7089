//! [`BulkKernel`]: many rows at a time. The weights of a stretch of outputs are widened once and the product is left to the
//! `gemm` library, whose order of summing depends on the number of rows.

use super::{Chunk, Job};
use crate::cpu::memory::Scratch;
use crate::cpu::simd::{Element, Kernel, Simd};

/// One stretch of outputs for all rows.
pub(super) struct BulkKernel<'a, W> {
    job: Job<'a>,
    stored: std::marker::PhantomData<W>,
}

impl<'a, W> BulkKernel<'a, W> {
    pub(super) fn new(job: Job<'a>) -> Self {
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
