//! What each entry weighed: the probability that a step's rows gave to every cached key of a KV head.
//!
//! The units leave their scores; once the rows' maxima and sums are known, a second pass over the scores turns them into
//! probabilities and averages them over the rows. That is one exponential per score, a small part of the score's own
//! dot product, and no row over all positions is ever written.

use super::{CHUNK, Unit};
use crate::cpu::simd::{Kernel, Simd};

/// Averages one unit's scores into masses.
pub(super) struct MassKernel<'a> {
    pub(super) unit: &'a Unit,
    /// The unit's scores: `[rows, CHUNK]`.
    pub(super) scores: &'a [f32],
    /// Maximum and sum of each row of the KV head: `[rows, 2]`.
    pub(super) softmax: &'a [f32],
    /// One mass per cached key of the unit.
    pub(super) out: &'a mut [f32],
}

impl Kernel for MassKernel<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.softmax.as_chunks::<2>().0;
        let share = 1.0 / rows.len() as f32;
        debug_assert!(self.out.len() <= self.unit.num_keys);
        // SAFETY: `scores` holds CHUNK floats per row, a multiple of LANES; `out` is no longer than a unit.
        unsafe {
            let mut masses = [0.0f32; CHUNK];
            for first in (0..self.out.len()).step_by(S::LANES) {
                let mut sum = S::splat(0.0);
                for (row, &[top, total]) in rows.iter().enumerate() {
                    let s = S::load(self.scores.as_ptr().add(row * CHUNK + first));
                    let weight = S::exp(S::sub(s, S::splat(top)));
                    sum = S::fma(weight, S::splat(share / total), sum);
                }
                S::store(masses.as_mut_ptr().add(first), sum);
            }
            self.out.copy_from_slice(&masses[..self.out.len()]);
        }
    }
}
