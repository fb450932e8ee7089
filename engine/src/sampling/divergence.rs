//! [`kl_divergence`]: how far one forward's prediction is from another's.

use super::softmax::{finite_max, weights_into};
use crate::error::EngineError;

/// KL(p ‖ q) in nats between the distributions of two rows of `[vocab_size]` logits, at temperature 1 and before any
/// sampling rule: what reading with q in place of p costs per token.
///
/// # Errors
/// [`EngineError::InvalidArgument`] when the rows differ in length, or one is empty or holds a NaN or an infinity.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> Result<f64, EngineError> {
    if p.len() != q.len() {
        return Err(EngineError::InvalidArgument {
            what: "logits",
            reason: format!("rows of {} and {} values", p.len(), q.len()),
        });
    }
    let (p_max, q_max) = (finite_max(p)?, finite_max(q)?);
    let mut p_weights = vec![0.0; p.len()];
    let mut q_weights = vec![0.0; q.len()];
    let p_total = weights_into(p, p_max, 1.0, &mut p_weights);
    let q_total = weights_into(q, q_max, 1.0, &mut q_weights);
    // log p − log q, up to the difference of the two normalisers.
    let gap = |(p, q): (&f32, &f32)| f64::from(p - p_max) - f64::from(q - q_max);
    let mean: f64 = p_weights
        .iter()
        .zip(p.iter().zip(q))
        .map(|(&weight, pair)| f64::from(weight) * gap(pair))
        .sum();
    // Rounding can take equal rows a hair below zero.
    Ok((mean / p_total + (q_total / p_total).ln()).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_textbook_sum() {
        let (p, q) = ([1.0_f32, -2.0, 0.5, 3.0], [0.0_f32, 1.0, 0.5, 2.0]);
        let probs = |row: &[f32; 4]| {
            let total: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
            row.map(|x| f64::from(x).exp() / total)
        };
        let (a, b) = (probs(&p), probs(&q));
        let expected: f64 = a.iter().zip(b).map(|(a, b)| a * (a / b).ln()).sum();
        assert!((kl_divergence(&p, &q).unwrap() - expected).abs() < 1e-6);
        let shifted = p.map(|x| x + 7.0);
        assert!(kl_divergence(&p, &shifted).unwrap() < 1e-9);
    }

    #[test]
    fn rows_that_mean_nothing_are_errors() {
        assert!(kl_divergence(&[0.0], &[0.0, 1.0]).is_err());
        assert!(kl_divergence(&[], &[]).is_err());
        assert!(kl_divergence(&[0.0, f32::NAN], &[0.0, 1.0]).is_err());
        assert!(kl_divergence(&[0.0, 1.0], &[0.0, f32::INFINITY]).is_err());
    }
}
