//! [`Source`]: one attention row per draft step, mixed from the draft's heads.

use serde::{Deserialize, Serialize};

use crate::error::MaskError;

/// Most log-odds, either way, between a source's p and the session's.
pub const MAX_P_OFFSET: f32 = 16.0;

/// How far the weights of a source may sum from 1.
const WEIGHT_TOLERANCE: f64 = 1e-3;

/// One draft head's share of a [`Source`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// Draft layer.
    pub layer: u32,
    /// Query head within the layer.
    pub head: u32,
    /// Its share: finite and not negative.
    pub weight: f32,
}

/// A fixed mixture of the draft's heads; the weights sum to 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The heads that take part, each at most once.
    pub terms: Vec<Term>,
    /// Log-odds added to those of the session's p: the mass that this source's selections reach. Within
    /// [`MAX_P_OFFSET`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub p_offset: f32,
    /// How a round's rows become one selection. `None`: the union of the rows' own selections, the paper's. `Some`: the
    /// selection of the rows' mean, [`spread`](crate::spread) by this share, in `[0, 1)`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<f32>,
}

fn is_zero(x: &f32) -> bool {
    *x == 0.0
}

impl Source {
    /// The mean of the `heads` heads of draft layer `layer`: the paper's source.
    pub fn layer_mean(layer: u32, heads: u32) -> Self {
        let weight = 1.0 / heads as f32;
        Self {
            p_offset: 0.0,
            spread: None,
            terms: (0..heads)
                .map(|head| Term {
                    layer,
                    head,
                    weight,
                })
                .collect(),
        }
    }

    /// Checks that this is a mixture of the heads of a draft of `layers` layers with `heads` query heads.
    ///
    /// # Errors
    /// [`MaskError::InvalidSource`]: no term, a head that does not exist or comes twice, a weight that is negative or
    /// not finite, weights that do not sum to 1 within 1e-3, an offset or a spread out of range.
    pub fn validate(&self, layers: u32, heads: u32) -> Result<(), MaskError> {
        let invalid = |reason: String| Err(MaskError::InvalidSource(reason));
        if self.terms.is_empty() {
            return invalid("it has no terms".into());
        }
        if self.terms.len() as u64 > u64::from(layers) * u64::from(heads) {
            return invalid(format!(
                "{} terms for {layers} layers of {heads} heads",
                self.terms.len()
            ));
        }
        if self.p_offset.is_nan() || self.p_offset.abs() > MAX_P_OFFSET {
            return invalid(format!(
                "log-odds of {} are not within {MAX_P_OFFSET}",
                self.p_offset
            ));
        }
        if let Some(share) = self.spread
            && !(0.0..1.0).contains(&share)
        {
            return invalid(format!("a spread of {share} is not in [0, 1)"));
        }
        let mut seen: Vec<(u32, u32)> = self.terms.iter().map(|t| (t.layer, t.head)).collect();
        seen.sort_unstable();
        if let Some(pair) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
            return invalid(format!(
                "layer {}, head {} comes twice",
                pair[0].0, pair[0].1
            ));
        }
        for term in &self.terms {
            if term.layer >= layers || term.head >= heads {
                return invalid(format!(
                    "layer {}, head {} is not among {layers} layers of {heads} heads",
                    term.layer, term.head
                ));
            }
            if !term.weight.is_finite() || term.weight < 0.0 {
                return invalid(format!("weight {} is not a share", term.weight));
            }
        }
        let sum: f64 = self.terms.iter().map(|t| f64::from(t.weight)).sum();
        if (sum - 1.0).abs() > WEIGHT_TOLERANCE {
            return invalid(format!("weights sum to {sum}, not to 1"));
        }
        Ok(())
    }

    /// Writes the mixture of this source's heads to `out`, as long as the rows. `row(layer, head)` gives the attention
    /// row of a draft head.
    ///
    /// # Errors
    /// [`MaskError::MissingRow`] where `row` has none, [`MaskError::InvalidSource`] where rows differ in length.
    pub fn mix<'a>(
        &self,
        row: impl Fn(u32, u32) -> Option<&'a [f32]>,
        out: &mut Vec<f32>,
    ) -> Result<(), MaskError> {
        out.clear();
        for (index, term) in self.terms.iter().enumerate() {
            let &Term {
                layer,
                head,
                weight,
            } = term;
            let row = row(layer, head).ok_or(MaskError::MissingRow { layer, head })?;
            if index == 0 {
                out.extend(row.iter().map(|&x| weight * x));
            } else if row.len() == out.len() {
                for (sum, &x) in out.iter_mut().zip(row) {
                    *sum += weight * x;
                }
            } else {
                return Err(MaskError::InvalidSource(format!(
                    "rows of {} and {} positions",
                    out.len(),
                    row.len()
                )));
            }
        }
        Ok(())
    }
}

/// The draft layers that `sources` mix, increasing: the ones whose attention rows a draft step must capture.
pub fn layers_in_use(sources: &[Source]) -> Vec<usize> {
    let mut layers: Vec<usize> = sources
        .iter()
        .flat_map(|source| &source.terms)
        .map(|term| term.layer as usize)
        .collect();
    layers.sort_unstable();
    layers.dedup();
    layers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(terms: &[(u32, u32, f32)]) -> Source {
        Source {
            p_offset: 0.0,
            spread: None,
            terms: terms
                .iter()
                .map(|&(layer, head, weight)| Term {
                    layer,
                    head,
                    weight,
                })
                .collect(),
        }
    }

    #[test]
    fn a_layer_mean_is_valid() {
        assert!(Source::layer_mean(2, 3).validate(3, 3).is_ok());
    }

    #[test]
    fn what_is_no_mixture_is_refused() {
        let bad = [
            source(&[]),
            source(&[(0, 0, 0.5)]),
            source(&[(3, 0, 1.0)]),
            source(&[(0, 3, 1.0)]),
            source(&[(0, 0, 1.5), (0, 1, -0.5)]),
            source(&[(0, 0, f32::NAN)]),
            source(&[(0, 0, f32::INFINITY)]),
            source(&[(1, 1, 0.5), (1, 1, 0.5)]),
        ];
        let offsets = [17.0, -17.0, f32::NAN].map(|p_offset| Source {
            p_offset,
            ..source(&[(0, 0, 1.0)])
        });
        let spreads = [1.0, -0.1, f32::NAN].map(|share| Source {
            spread: Some(share),
            ..source(&[(0, 0, 1.0)])
        });
        for source in bad.into_iter().chain(offsets).chain(spreads) {
            let error = source.validate(3, 3).unwrap_err();
            assert_eq!(error.label(), "invalid_source", "{source:?}");
        }
    }

    #[test]
    fn mixes_rows_by_weight() {
        let rows = [[1.0f32, 0.0], [0.5, 0.5]];
        let mut out = vec![9.0; 5];
        source(&[(0, 0, 0.25), (1, 0, 0.75)])
            .mix(
                |layer, _| rows.get(layer as usize).map(|r| &r[..]),
                &mut out,
            )
            .unwrap();
        assert_eq!(out, [0.625, 0.375]);
    }

    #[test]
    fn rows_that_lack_or_differ_are_errors() {
        let (long, short) = ([0.0f32; 3], [0.0f32; 2]);
        let mut out = Vec::new();
        let two = source(&[(0, 0, 0.5), (1, 0, 0.5)]);
        let lacking = two.mix(|layer, _| (layer == 0).then_some(&long[..]), &mut out);
        assert!(matches!(
            lacking,
            Err(MaskError::MissingRow { layer: 1, head: 0 })
        ));
        let differing = two.mix(
            |layer, _| Some(if layer == 0 { &long[..] } else { &short[..] }),
            &mut out,
        );
        assert_eq!(differing.unwrap_err().label(), "invalid_source");
    }

    #[test]
    fn layers_in_use_are_distinct_and_sorted() {
        let sources = [source(&[(2, 0, 0.5), (0, 1, 0.5)]), source(&[(2, 1, 1.0)])];
        assert_eq!(layers_in_use(&sources), [0, 2]);
    }
}
