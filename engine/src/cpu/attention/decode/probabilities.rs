//! From the units' weights to probabilities: whole rows of a step's last token, and what each entry weighed.
//!
//! The units leave their weights under their own maxima. Once a row's maximum and sum over all units are known, a weight
//! is a probability up to one factor per row and unit: no exponential is taken twice.

use super::super::NO_SCORE;
use super::{CHUNK, Keys, Unit};
use crate::cpu::simd::{Kernel, Simd};

/// One unit's weights, and what makes probabilities of them.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) unit: &'a Unit,
    /// Under the unit's maxima: `[rows, CHUNK]`.
    pub(super) weights: &'a [f32],
    /// The unit's maxima: `[rows]`.
    pub(super) maxima: &'a [f32],
    /// Maximum and sum of each row of the KV head over all units: `[rows, 2]`.
    pub(super) softmax: &'a [f32],
}

impl<'a> Weights<'a> {
    /// Those of a unit whose span has `rows` rows per KV head, out of all units' `partials` and `weights` and the span's
    /// `softmax`.
    pub(super) fn of(
        unit: &'a Unit,
        rows: usize,
        partials: &'a [f32],
        weights: &'a [f32],
        softmax: &'a [f32],
    ) -> Self {
        Self {
            unit,
            weights: &weights[unit.weights..][..rows * CHUNK],
            maxima: &partials[unit.partial..][..rows],
            softmax: &softmax[unit.kv_head * rows * 2..][..rows * 2],
        }
    }

    /// What a weight of `row` is multiplied by to be a probability.
    #[inline(always)]
    unsafe fn factor<S: Simd>(&self, row: usize) -> f32 {
        let (maximum, top, sum) = (
            self.maxima[row],
            self.softmax[2 * row],
            self.softmax[2 * row + 1],
        );
        if maximum == NO_SCORE {
            return 0.0;
        }
        // SAFETY: arithmetic inside the caller's instruction set. All lanes are equal: reduce_max picks one.
        unsafe { S::reduce_max(S::exp(S::splat(maximum - top))) / sum }
    }
}

/// Averages one unit's probabilities over the rows: the mass of each entry.
pub(super) struct MassKernel<'a> {
    pub(super) from: Weights<'a>,
    /// One mass per cached key of the unit.
    pub(super) out: &'a mut [f32],
}

impl Kernel for MassKernel<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let rows = self.from.maxima.len();
        let share = 1.0 / rows as f32;
        debug_assert!(self.out.len() <= self.from.unit.num_keys);
        let mut masses = [0.0f32; CHUNK];
        for row in 0..rows {
            // SAFETY: `weights` holds CHUNK floats per row, a multiple of LANES; `out` is no longer than a unit.
            unsafe {
                let factor = S::splat(self.from.factor::<S>(row) * share);
                let weights = self.from.weights.as_ptr().add(row * CHUNK);
                for first in (0..self.out.len()).step_by(S::LANES) {
                    let mass = masses.as_mut_ptr().add(first);
                    let sum = S::fma(S::load(weights.add(first)), factor, S::load(mass));
                    S::store(mass, sum);
                }
            }
        }
        self.out.copy_from_slice(&masses[..self.out.len()]);
    }
}

/// Writes one unit's probabilities of one row to the positions of its keys.
pub(super) struct CaptureKernel<'a> {
    pub(super) from: Weights<'a>,
    pub(super) row: usize,
    pub(super) keys: Keys<'a>,
    /// The row over all positions.
    pub(super) out: &'a mut [f32],
}

impl Kernel for CaptureKernel<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Unit {
            first_key,
            num_keys,
            ..
        } = *self.from.unit;
        // SAFETY: inside the instruction set of this kernel.
        let factor = unsafe { self.from.factor::<S>(self.row) };
        let weights = &self.from.weights[self.row * CHUNK..][..num_keys];
        if self.keys.list.is_none() {
            let out = &mut self.out[first_key..][..num_keys];
            for (out, w) in out.iter_mut().zip(weights) {
                *out = w * factor;
            }
        } else {
            for (index, w) in weights.iter().enumerate() {
                self.out[self.keys.position(first_key + index)] = w * factor;
            }
        }
    }
}
