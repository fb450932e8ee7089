//! [`Metric`]: how far a source's row is from the target row that it stands for.

use specattn_mask::{PositionSet, select_top_p};

/// Probabilities below this count as this: a row that rounds to zero somewhere must not make everything infinite.
const FLOOR: f32 = 1e-9;

/// Mass of the top-p sets that [`Metric::Recall`] compares.
const RECALL_P: f32 = 0.9;

/// A measure of distance between attention rows; 0 for equal rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Metric {
    /// Kullback-Leibler divergence KL(target ‖ source) in nats: the paper's.
    #[default]
    KullbackLeibler,
    /// Jensen-Shannon divergence in nats: symmetric, at most ln 2.
    JensenShannon,
    /// The share of the target's own top-0.9 set's mass that the source's top-0.9 set misses.
    Recall,
}

impl Metric {
    /// What it measures, for a layer map's file.
    pub fn description(self) -> &'static str {
        match self {
            Self::KullbackLeibler => "KL(target || source), nats, mean over rows",
            Self::JensenShannon => "Jensen-Shannon divergence, nats, mean over rows",
            Self::Recall => {
                "share of the target's top-0.9 mass outside the source's top-0.9 set, mean over rows"
            }
        }
    }

    /// The distance between two rows of equal length.
    pub fn distance(self, target: &[f32], source: &[f32]) -> f64 {
        match self {
            Self::KullbackLeibler => kullback_leibler(target, source),
            Self::JensenShannon => {
                let middle: Vec<f32> = target
                    .iter()
                    .zip(source)
                    .map(|(t, s)| (t + s) / 2.0)
                    .collect();
                (kullback_leibler(target, &middle) + kullback_leibler(source, &middle)) / 2.0
            }
            Self::Recall => missed_share(target, source),
        }
    }
}

/// KL(p ‖ q) in nats.
fn kullback_leibler(p: &[f32], q: &[f32]) -> f64 {
    let terms = p.iter().zip(q).filter(|(p, _)| **p > FLOOR);
    terms
        .map(|(&p, &q)| f64::from(p) * f64::from(p / q.max(FLOOR)).ln())
        .sum()
}

fn missed_share(target: &[f32], source: &[f32]) -> f64 {
    let mut wanted = PositionSet::new(target.len());
    let mut found = PositionSet::new(target.len());
    select_top_p(target, RECALL_P, &mut wanted);
    select_top_p(source, RECALL_P, &mut found);
    let (mut mass, mut missed) = (0.0, 0.0);
    for position in wanted.iter() {
        let weight = f64::from(target[position]);
        mass += weight;
        if !found.contains(position) {
            missed += weight;
        }
    }
    if mass > 0.0 { missed / mass } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: [Metric; 3] = [
        Metric::KullbackLeibler,
        Metric::JensenShannon,
        Metric::Recall,
    ];

    #[test]
    fn equal_rows_have_no_distance() {
        let row = [0.7, 0.2, 0.1, 0.0];
        for metric in METRICS {
            assert!(metric.distance(&row, &row).abs() < 1e-9, "{metric:?}");
        }
    }

    #[test]
    fn figures_agree_with_the_definitions() {
        let (p, q) = ([0.5, 0.5], [0.25, 0.75]);
        let kl = 0.5 * 2f64.ln() + 0.5 * (2.0f64 / 3.0).ln();
        assert!((Metric::KullbackLeibler.distance(&p, &q) - kl).abs() < 1e-6);
        let disjoint = Metric::JensenShannon.distance(&[1.0, 0.0], &[0.0, 1.0]);
        assert!((disjoint - 2f64.ln()).abs() < 1e-6);
        assert_eq!(Metric::Recall.distance(&[1.0, 0.0], &[0.0, 1.0]), 1.0);
    }

    #[test]
    fn zeros_in_the_source_stay_finite() {
        for metric in METRICS {
            assert!(metric.distance(&[0.5, 0.5], &[1.0, 0.0]).is_finite());
        }
    }
}
