//! Log-probabilities under the model's own distribution: before bias, penalties, temperature and truncation.

use super::softmax::{finite_max, sum_of_exp};
use crate::error::EngineError;

/// How probable a token was, and what else was probable. Natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token's own.
    pub logprob: f32,
    /// The most probable tokens, most probable first, the lowest id among equals.
    pub top: Vec<(u32, f32)>,
}

/// Log-probabilities of `token` and of the `count` most probable tokens, from a row of raw logits.
///
/// # Errors
/// [`EngineError::InvalidArgument`] for a NaN or an infinity, [`EngineError::InvalidToken`] for a token outside the row.
pub fn token_logprobs(
    logits: &[f32],
    token: u32,
    count: u32,
) -> Result<TokenLogprobs, EngineError> {
    let own = *logits
        .get(token as usize)
        .ok_or(EngineError::InvalidToken {
            token,
            vocab_size: logits.len(),
        })?;
    let max = finite_max(logits)?;
    let log_total = sum_of_exp(logits, max).ln();
    let logprob = |logit: f32| (f64::from(logit) - f64::from(max) - log_total) as f32;
    Ok(TokenLogprobs {
        logprob: logprob(own),
        top: largest(logits, count as usize)
            .into_iter()
            .map(|(id, logit)| (id, logprob(logit)))
            .collect(),
    })
}

/// The `count` largest values, descending, by insertion: `count` is small and later insertions are rare.
fn largest(values: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(values.len());
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, &value) in values.iter().enumerate() {
        if top.len() == count && top.last().is_none_or(|&(_, least)| value <= least) {
            continue;
        }
        let place = top.partition_point(|&(_, other)| other >= value);
        top.insert(place, (id as u32, value));
        top.truncate(count);
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_come_back() {
        let row: Vec<f32> = [0.1_f32, 0.4, 0.3, 0.2]
            .iter()
            .map(|p| p.ln() + 5.0)
            .collect();
        let got = token_logprobs(&row, 3, 2).unwrap();
        assert!((got.logprob.exp() - 0.2).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
        assert!((got.top[0].1.exp() - 0.4).abs() < 1e-6);
        assert!(token_logprobs(&row, 3, 0).unwrap().top.is_empty());
        assert_eq!(token_logprobs(&row, 3, 20).unwrap().top.len(), 4);
    }

    #[test]
    fn ties_go_to_the_lowest_ids() {
        let ids = |n| {
            largest(&[1.0, 3.0, 3.0, 1.0, 3.0], n)
                .iter()
                .map(|t| t.0)
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(2), [1, 2]);
        assert_eq!(ids(4), [1, 2, 4, 0]);
    }

    #[test]
    fn bad_input_is_an_error() {
        assert_eq!(
            token_logprobs(&[0.0], 1, 1).unwrap_err().label(),
            "invalid_token"
        );
        assert!(token_logprobs(&[0.0, f32::NAN], 0, 1).is_err());
    }
}
