//! [`expected_tokens`]: what a round comes to.

/// Tokens that a round of `length` draft tokens settles on average, when each is accepted with `probability` below 1 where those before it
/// were: (1 − a^(k+1)) / (1 − a) (Leviathan et al. 2023, section 3.1).
pub fn expected_tokens(probability: f64, length: usize) -> f64 {
    (1.0 - probability.powi(length as i32 + 1)) / (1.0 - probability)
}
