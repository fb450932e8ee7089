//! Mixtures of draft heads fitted by expectation-maximisation (Dempster, Laird and Rubin 1977).
//!
//! The weights that minimise KL(target ‖ Σ w_j draft_j), summed over samples, maximise Σ target · ln Σ w_j draft_j. That
//! is the likelihood of a mixture with known components: each iteration hands every unit of target mass to the draft
//! heads in proportion to w_j draft_j there, and the shares are the new weights. The objective is concave, so the fit
//! does not depend on the start as long as every weight starts positive.

use crate::recording::Recording;

/// Iterations at most.
const MAX_ITERATIONS: usize = 60;

/// The fit ends when no weight moves by more than this.
const TOLERANCE: f32 = 1e-3;

/// Keeps divisions finite where every draft head's probability rounds to zero.
const FLOOR: f32 = 1e-12;

/// The weights, one per draft head, of the mixture nearest to the target's KV heads `heads` together, where each head
/// also has its own memory to draw on: a further component whose weight is not the draft's and is left out of the sum.
pub fn fit(recording: &Recording, heads: &[usize]) -> Vec<f32> {
    let count = recording.draft_heads();
    let mut weights = vec![1.0 / (count + 1) as f32; count];
    let mut of_memory = vec![1.0 / (count + 1) as f32; heads.len()];
    let (mut mixed, mut ratio, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..MAX_ITERATIONS {
        let mut next = vec![0.0f64; count];
        let mut next_of_memory = vec![0.0f64; heads.len()];
        for sample in &recording.samples {
            mix(&weights, &sample.draft, sample.len, &mut mixed);
            ratio.clear();
            ratio.resize(sample.len, 0.0);
            for (index, &head) in heads.iter().enumerate() {
                let memory = sample.memory_row(head);
                own.clear();
                own.extend(
                    sample
                        .target_row(head)
                        .iter()
                        .zip(&mixed)
                        .zip(memory)
                        .map(|((&t, &m), &r)| t / (m + of_memory[index] * r).max(FLOOR)),
                );
                next_of_memory[index] += f64::from(of_memory[index] * dot(&own, memory));
                for (sum, &x) in ratio.iter_mut().zip(&own) {
                    *sum += x;
                }
            }
            for (head, next) in next.iter_mut().enumerate() {
                if weights[head] > 0.0 {
                    *next += f64::from(weights[head] * dot(&ratio, sample.draft_row(head)));
                }
            }
        }
        // A head's memory and the draft's heads share the head's mass; the draft's weights are the heads' together.
        let each = recording.samples.len() as f64;
        let total: f64 = next.iter().sum();
        if total <= 0.0 {
            break;
        }
        let mut moved = 0.0f32;
        for (weight, &next) in weights.iter_mut().zip(&next) {
            let new = (next / (each * heads.len() as f64)) as f32;
            moved = moved.max((new - *weight).abs());
            *weight = new;
        }
        for (weight, &next) in of_memory.iter_mut().zip(&next_of_memory) {
            *weight = (next / each) as f32;
        }
        if moved < TOLERANCE {
            break;
        }
    }
    let total: f32 = weights.iter().sum();
    if total > 0.0 {
        for weight in &mut weights {
            *weight /= total;
        }
    }
    weights
}

/// Drops weights below `least` and scales the others to sum to 1; the largest always stays.
pub fn prune(weights: &[f32], least: f32) -> Vec<f32> {
    let top = weights.iter().copied().fold(0.0, f32::max);
    let bound = least.min(top);
    let kept: f32 = weights.iter().filter(|&&w| w >= bound).sum();
    weights
        .iter()
        .map(|&w| if w >= bound { w / kept } else { 0.0 })
        .collect()
}

/// `out = Σ weights[j] · rows[j]`, rows of `len` entries one after another.
pub fn mix(weights: &[f32], rows: &[f32], len: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(len, 0.0);
    for (&weight, row) in weights.iter().zip(rows.chunks_exact(len)) {
        if weight > 0.0 {
            for (sum, &x) in out.iter_mut().zip(row) {
                *sum += weight * x;
            }
        }
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (a_vectors, a_rest) = a.as_chunks::<LANES>();
    let (b_vectors, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_vectors.iter().zip(b_vectors) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recording::Sample;
    use specattn_mask::PairShape;

    /// Three draft heads with peaks of their own; the target mixes them by `weights`.
    fn recording(weights: &[f32; 3]) -> Recording {
        let len = 40;
        let samples = (0..6)
            .map(|s| {
                let mut draft = Vec::new();
                for head in 0..3 {
                    let row: Vec<f32> = (0..len)
                        .map(|i| {
                            if (i + s) % 3 == head {
                                1.0 + i as f32
                            } else {
                                0.3
                            }
                        })
                        .collect();
                    let sum: f32 = row.iter().sum();
                    draft.extend(row.iter().map(|x| x / sum));
                }
                let mut target = Vec::new();
                mix(weights, &draft, len, &mut target);
                let memory = vec![0.0; len];
                Sample {
                    len,
                    target,
                    draft,
                    memory,
                }
            })
            .collect();
        Recording {
            pair: PairShape {
                target_layers: 1,
                target_kv_heads: 1,
                draft_layers: 1,
                draft_heads: 3,
            },
            samples,
        }
    }

    #[test]
    fn recovers_the_weights_of_a_mixture() {
        for weights in [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]] {
            let fitted = fit(&recording(&weights), &[0]);
            for (found, expected) in fitted.iter().zip(weights) {
                assert!((found - expected).abs() < 0.02, "{fitted:?}");
            }
        }
    }

    #[test]
    fn pruned_weights_sum_to_one() {
        assert_eq!(
            prune(&[0.5, 0.495, 0.005], 0.01),
            [0.5 / 0.995, 0.495 / 0.995, 0.0]
        );
        assert_eq!(prune(&[0.25; 4], 0.5), [0.25; 4]);
    }
}
