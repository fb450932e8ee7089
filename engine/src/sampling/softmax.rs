//! Loops over rows of logits, written to be vectorised by the compiler on any target: lanes are explicit arrays, the
//! exponential is a polynomial, and nothing branches per element.

use super::widest::widest;
use crate::error::EngineError;

/// Partial results kept side by side, since the compiler may not reorder a float reduction by itself.
const LANES: usize = 16;
/// Elements that are compared without early exit, so that the comparison vectorises.
const BLOCK: usize = 256;
/// Elements summed in f32 before the sum goes to f64.
const SUM_BLOCK: usize = 1024;

/// The largest logit.
///
/// # Errors
/// [`EngineError::InvalidArgument`] when the row is empty or holds a NaN or an infinity.
pub(super) fn finite_max(logits: &[f32]) -> Result<f32, EngineError> {
    let (max, is_sound) = max_and_soundness(logits);
    if !is_sound {
        return Err(EngineError::InvalidArgument {
            what: "logits",
            reason: first_non_finite(logits),
        });
    }
    Ok(max)
}

#[inline(always)]
fn plain_max_and_soundness(logits: &[f32]) -> (f32, bool) {
    let mut max = [f32::NEG_INFINITY; LANES];
    // x · 0 is 0 for finite x and NaN otherwise, and NaN survives the sum.
    let mut poison = [0.0_f32; LANES];
    let (chunks, rest) = logits.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            let x = chunk[lane];
            max[lane] = if x > max[lane] { x } else { max[lane] };
            poison[lane] += x * 0.0;
        }
    }
    for (lane, &x) in rest.iter().enumerate() {
        max[lane] = max[lane].max(x);
        poison[lane] += x * 0.0;
    }
    let max = max.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let is_poisoned = poison.iter().any(|p| p.is_nan());
    (max, max.is_finite() && !is_poisoned)
}

fn first_non_finite(logits: &[f32]) -> String {
    match logits.iter().enumerate().find(|(_, x)| !x.is_finite()) {
        Some((token, value)) => format!("token {token} has the non-finite value {value}"),
        None => "the row is empty".to_owned(),
    }
}

/// The first of the largest logits; `None` when the row is empty or holds a NaN or an infinity.
pub(crate) fn most_probable(logits: &[f32]) -> Option<u32> {
    let max = finite_max(logits).ok()?;
    first_index_of(logits, max).map(|token| token as u32)
}

/// The first index holding `value`.
pub(super) fn first_index_of(row: &[f32], value: f32) -> Option<usize> {
    let block = first_block_with(row, value)?;
    let offset = row[block * BLOCK..].iter().position(|&x| x == value)?;
    Some(block * BLOCK + offset)
}

#[inline(always)]
fn plain_first_block_with(row: &[f32], value: f32) -> Option<usize> {
    for (number, block) in row.chunks(BLOCK).enumerate() {
        let mut found = false;
        for &x in block {
            found |= x == value;
        }
        if found {
            return Some(number);
        }
    }
    None
}

#[inline(always)]
fn plain_weights_into(
    logits: &[f32],
    max: f32,
    inverse_temperature: f32,
    weights: &mut [f32],
) -> f64 {
    let mut total = 0.0;
    for (logits, weights) in logits.chunks(SUM_BLOCK).zip(weights.chunks_mut(SUM_BLOCK)) {
        for (weight, &logit) in weights.iter_mut().zip(logits) {
            *weight = exp_of_nonpositive((logit - max) * inverse_temperature);
        }
        total += block_sum(weights);
    }
    total
}

#[inline(always)]
fn plain_scale(values: &mut [f32], factor: f32) {
    for value in values {
        *value *= factor;
    }
}

#[inline(always)]
fn plain_sum(values: &[f32]) -> f64 {
    let mut total = 0.0;
    for block in values.chunks(SUM_BLOCK) {
        total += block_sum(block);
    }
    total
}

#[inline(always)]
fn block_sum(values: &[f32]) -> f64 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    let mut total = 0.0;
    for lane in lanes {
        total += f64::from(lane);
    }
    total
}

widest! {
    /// The largest logit, and whether there is one and all are finite.
    fn max_and_soundness(logits: &[f32]) -> (f32, bool) = plain_max_and_soundness;
    /// The first block of [`BLOCK`] elements that holds `value`.
    fn first_block_with(row: &[f32], value: f32) -> Option<usize> = plain_first_block_with;
    /// Writes exp((logit − max) · inverse_temperature) for every logit: weights in [0, 1]. Returns their sum.
    ///
    /// `weights` is as long as `logits`; no logit is above `max`; one equals it, so that the sum is at least 1.
    fn weights_into(logits: &[f32], max: f32, inverse_temperature: f32, weights: &mut [f32]) -> f64 = plain_weights_into;
    /// Multiplies every value by `factor`.
    fn scale(values: &mut [f32], factor: f32) -> () = plain_scale;
    /// The sum of non-negative values: f32 lanes over short blocks, f64 over the blocks.
    fn sum(values: &[f32]) -> f64 = plain_sum;
}

/// The sum of exp(logit − max).
pub(super) fn sum_of_exp(logits: &[f32], max: f32) -> f64 {
    let mut buffer = [0.0_f32; SUM_BLOCK];
    logits
        .chunks(SUM_BLOCK)
        .map(|chunk| weights_into(chunk, max, 1.0, &mut buffer[..chunk.len()]))
        .sum()
}

/// eˣ for x ≤ 0 to about 1e-7 relative; exactly 1 at 0 and exactly 0 below -87, where f32 would lose precision anyway.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; 2ⁿ is written into the exponent bits, eʳ is its Taylor series to the seventh power
/// (remainder under 6e-9). ln 2 is split so that n·LN2_HIGH
/// is exact.
#[inline(always)]
fn exp_of_nonpositive(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer and leaves it in the low mantissa bits: no conversion instruction needed.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = (std::f64::consts::LN_2 - LN2_HIGH as f64) as f32;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut series = 1.0 / 5040.0;
    series = series * r + 1.0 / 720.0;
    series = series * r + 1.0 / 120.0;
    series = series * r + 1.0 / 24.0;
    series = series * r + 1.0 / 6.0;
    series = series * r + 0.5;
    series = series * r + 1.0;
    series = series * r + 1.0;
    const EXPONENT_BIAS: u32 = 127;
    const MANTISSA_BITS: u32 = 23;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(EXPONENT_BIAS) << MANTISSA_BITS);
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        assert_eq!(exp_of_nonpositive(0.0), 1.0);
        assert_eq!(exp_of_nonpositive(-87.01), 0.0);
        assert_eq!(exp_of_nonpositive(-3e38), 0.0);
        assert_eq!(exp_of_nonpositive(f32::NEG_INFINITY), 0.0);
        for i in 0..870_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            let relative = (f64::from(exp_of_nonpositive(x)) - exact).abs() / exact;
            assert!(relative < 2.5e-7, "exp({x}) off by {relative:e}");
        }
    }

    #[test]
    fn max_sees_every_element_and_refuses_what_is_not_finite() {
        for len in [1, 2, 15, 16, 17, 33, 1000] {
            for at in [0, len / 2, len - 1] {
                let mut row = vec![-5.0; len];
                row[at] = -1.0;
                assert_eq!(finite_max(&row).unwrap(), -1.0);
                assert_eq!(first_index_of(&row, -1.0), Some(at));
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    row[at] = bad;
                    let error = finite_max(&row).unwrap_err();
                    assert!(
                        error.to_string().contains(&format!("token {at} ")),
                        "{error}"
                    );
                }
            }
        }
        assert!(finite_max(&[]).is_err());
    }

    #[test]
    fn wider_vectors_give_the_same_bits() {
        for len in [1, 15, 16, 33, 1000, 1024, 5003] {
            let logits: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin() * 9.0).collect();
            let (max, is_sound) = max_and_soundness(&logits);
            assert_eq!((max, is_sound), plain_max_and_soundness(&logits));
            let (mut wide, mut plain) = (vec![0.0; len], vec![0.0; len]);
            let total = weights_into(&logits, max, 1.25, &mut wide);
            let plain_total = plain_weights_into(&logits, max, 1.25, &mut plain);
            assert_eq!(total.to_bits(), plain_total.to_bits());
            assert_eq!(wide, plain);
            assert_eq!(sum(&wide).to_bits(), plain_sum(&plain).to_bits());
            scale(&mut wide, 0.3);
            plain_scale(&mut plain, 0.3);
            assert_eq!(wide, plain);
        }
    }

    #[test]
    fn sums_and_weights_agree_with_f64() {
        let logits: Vec<f32> = (0..5000).map(|i| ((i * 37) % 101) as f32 * 0.1).collect();
        let max = finite_max(&logits).unwrap();
        let mut weights = vec![0.0; logits.len()];
        let total = weights_into(&logits, max, 0.5, &mut weights);
        let exact: f64 = logits
            .iter()
            .map(|&x| ((f64::from(x) - f64::from(max)) * 0.5).exp())
            .sum();
        assert!((total / exact - 1.0).abs() < 1e-6);
        assert_eq!(total, sum(&weights));
    }
}
