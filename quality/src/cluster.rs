//! A bounded number of sources for any number of KV heads: clusters of heads that share a mixture.
//!
//! Lloyd's iteration with KL divergence as the distance: every head joins the source nearest to it, every source is
//! fitted anew to its heads. It starts from heads whose own mixtures lie far apart, and ends when no head moves.

use crate::mixture;
use crate::recording::Recording;

/// Rounds of joining and fitting at most.
const MAX_ROUNDS: usize = 12;

/// Sources, and who uses them.
#[derive(Debug, Clone, PartialEq)]
pub struct Clusters {
    /// `[sources][draft heads]`.
    pub weights: Vec<Vec<f32>>,
    /// Per KV head, counted through all layers: its source.
    pub of_head: Vec<usize>,
}

/// Clusters KV heads, whose own mixtures are `own`, into at most `most` sources. Weights below `least` are dropped.
pub fn cluster(recording: &Recording, own: &[Vec<f32>], most: usize, least: f32) -> Clusters {
    let pruned = |weights: Vec<f32>| mixture::prune(&weights, least);
    if most >= own.len() {
        let weights = own.iter().map(|w| mixture::prune(w, least)).collect();
        return Clusters {
            weights,
            of_head: (0..own.len()).collect(),
        };
    }
    let mut weights: Vec<Vec<f32>> = seeds(own, most.max(1))
        .into_iter()
        .map(|head| mixture::prune(&own[head], least))
        .collect();
    let mut of_head = vec![usize::MAX; own.len()];
    for _ in 0..MAX_ROUNDS {
        let nearest = nearest_sources(recording, &weights);
        if nearest == of_head {
            break;
        }
        of_head = nearest;
        for (source, weights) in weights.iter_mut().enumerate() {
            let heads: Vec<usize> = (0..of_head.len())
                .filter(|&h| of_head[h] == source)
                .collect();
            if !heads.is_empty() {
                *weights = pruned(mixture::fit(recording, &heads));
            }
        }
    }
    Clusters::of_used(weights, of_head)
}

impl Clusters {
    /// The sources among `weights` that somebody uses.
    pub fn of_used(mut weights: Vec<Vec<f32>>, mut of_head: Vec<usize>) -> Self {
        for source in (0..weights.len()).rev() {
            if of_head.contains(&source) {
                continue;
            }
            weights.remove(source);
            for of_head in of_head.iter_mut().filter(|s| **s > source) {
                *of_head -= 1;
            }
        }
        Self { weights, of_head }
    }
}

/// Heads whose mixtures lie far apart: each is the farthest from those before it. The first is the one nearest to the
/// mean of all.
fn seeds(own: &[Vec<f32>], count: usize) -> Vec<usize> {
    let terms = own[0].len();
    let mean: Vec<f32> = (0..terms)
        .map(|j| own.iter().map(|w| w[j]).sum::<f32>() / own.len() as f32)
        .collect();
    let nearest_to_mean = (0..own.len())
        .min_by(|&a, &b| hellinger(&own[a], &mean).total_cmp(&hellinger(&own[b], &mean)))
        .unwrap_or(0);
    let mut seeds = vec![nearest_to_mean];
    while seeds.len() < count {
        let distance = |head: usize| {
            let distances = seeds.iter().map(|&s| hellinger(&own[head], &own[s]));
            distances.fold(f32::INFINITY, f32::min)
        };
        let farthest = (0..own.len()).max_by(|&a, &b| distance(a).total_cmp(&distance(b)));
        seeds.extend(farthest);
    }
    seeds
}

/// Squared Hellinger distance of two mixtures' weights, twice over.
fn hellinger(a: &[f32], b: &[f32]) -> f32 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (a.sqrt() - b.sqrt()).powi(2))
        .sum()
}

/// For each KV head, the source with the least KL divergence, summed over samples.
fn nearest_sources(recording: &Recording, weights: &[Vec<f32>]) -> Vec<usize> {
    let (heads, count) = (recording.target_heads(), weights.len());
    // KL differs from this cross entropy by the target's own entropy, the same for every source.
    let mut cross = vec![0.0f64; heads * count];
    let mut mixed = Vec::new();
    for sample in &recording.samples {
        for (source, weights) in weights.iter().enumerate() {
            mixture::mix(weights, &sample.draft, sample.len, &mut mixed);
            for x in &mut mixed {
                *x = x.max(1e-9).ln();
            }
            for head in 0..heads {
                let row = sample.target_row(head);
                let sum: f32 = row.iter().zip(&mixed).map(|(&t, &ln)| t * ln).sum();
                cross[head * count + source] -= f64::from(sum);
            }
        }
    }
    cross
        .chunks_exact(count)
        .map(|row| {
            let best = (0..row.len()).min_by(|&a, &b| row[a].total_cmp(&row[b]));
            best.unwrap_or(0)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::Sample;
    use specattn_mask::PairShape;

    /// Four KV heads that follow two draft heads in pairs.
    fn recording() -> (Recording, Vec<Vec<f32>>) {
        let (len, follows) = (8, [0, 1, 0, 1]);
        let rows = [[0.65, 0.05], [0.05, 0.65]];
        let row = |head: usize| (0..len).map(move |i| rows[head].get(i).copied().unwrap_or(0.05));
        let sample = Sample {
            len,
            target: follows.iter().flat_map(|&head| row(head)).collect(),
            draft: (0..2).flat_map(row).collect(),
            memory: vec![0.0; 4 * len],
        };
        let recording = Recording {
            pair: PairShape {
                target_layers: 2,
                target_kv_heads: 2,
                draft_layers: 1,
                draft_heads: 2,
            },
            samples: vec![sample],
        };
        let own = (0..4)
            .map(|head| mixture::fit(&recording, &[head]))
            .collect();
        (recording, own)
    }

    #[test]
    fn heads_that_agree_share_a_source() {
        let (recording, own) = recording();
        let clusters = cluster(&recording, &own, 2, 0.01);
        assert_eq!(clusters.weights.len(), 2);
        assert_eq!(clusters.of_head[0], clusters.of_head[2]);
        assert_eq!(clusters.of_head[1], clusters.of_head[3]);
        assert_ne!(clusters.of_head[0], clusters.of_head[1]);
    }

    #[test]
    fn sources_in_use_are_bounded() {
        let (recording, own) = recording();
        for most in 1..6 {
            let clusters = cluster(&recording, &own, most, 0.01);
            assert!(clusters.weights.len() <= most);
            assert!(clusters.of_head.iter().all(|&s| s < clusters.weights.len()));
        }
    }
}
