//! Pseudo-random numbers that 16-bit types hold exactly, and the distance of two results.

use half::{bf16, f16};
use specattn_engine::DType;

/// SplitMix64 (Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// `len` numbers in ±spread, rounded to `half`.
    pub fn rounded(&mut self, len: usize, spread: f32, half: DType) -> Vec<f32> {
        (0..len)
            .map(|_| round((2.0 * self.uniform() - 1.0) * spread, half))
            .collect()
    }

    /// A random order of `0..len`.
    pub fn shuffled(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for i in (1..len).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// The nearest number of a 16-bit type.
pub fn round(x: f32, half: DType) -> f32 {
    match half {
        DType::F32 => x,
        DType::Bf16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
    }
}

/// ‖got − want‖ ÷ ‖want‖; infinite for another length or anything that is not a number.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let (mut difference, mut norm) = (0.0, 0.0);
    for (&g, &w) in got.iter().zip(want) {
        difference += (f64::from(g) - w).powi(2);
        norm += w * w;
    }
    let error = (difference / norm.max(1e-300)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}
