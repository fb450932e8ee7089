//! Selecting the largest weights by count or by mass, without sorting and without allocating.
//!
//! Non-negative floats order like their bit patterns, and weights up to 1 fit 30 bits, so three radix passes of 10 bits
//! find the exact weight at which the goal is met. Ties at that weight go to the lowest ids.

/// How much to keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Goal {
    /// This many entries, at least one.
    Count(usize),
    /// The fewest entries whose weights sum to at least this, above zero.
    Mass(f64),
}

/// Keeps every weight above `weight`, and the first `ties` that equal it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cutoff {
    weight: f32,
    ties: usize,
}

impl Cutoff {
    /// Keeps every positive weight from `weight` up.
    pub(super) fn at_least(weight: f32) -> Self {
        Self {
            weight,
            ties: usize::MAX,
        }
    }
}

/// Where the largest of `weights`, each in [0, 1], meet `goal`. When all of them do not, nothing is cut.
pub(super) fn cutoff(weights: &[f32], goal: Goal) -> Cutoff {
    let (wanted, by_mass) = match goal {
        Goal::Count(count) if count >= weights.len() => return Cutoff::at_least(0.0),
        Goal::Count(count) => (count as f64, false),
        Goal::Mass(mass) => (mass, true),
    };
    let measure = |weight: f32| if by_mass { f64::from(weight) } else { 1.0 };

    const DIGIT_BITS: u32 = 10;
    const SLOTS: usize = 1 << DIGIT_BITS;
    // The digits settled so far, and the measure of the weights above every weight that begins with them.
    let mut prefix = 0_u32;
    let mut above = 0.0;
    for shift in [2 * DIGIT_BITS, DIGIT_BITS, 0] {
        let mut slots = [0.0_f64; SLOTS];
        for &weight in weights {
            let bits = weight.to_bits() >> shift;
            if bits >> DIGIT_BITS == prefix {
                slots[bits as usize % SLOTS] += measure(weight);
            }
        }
        let mut slot = SLOTS - 1;
        while slot > 0 && above + slots[slot] < wanted {
            above += slots[slot];
            slot -= 1;
        }
        prefix = prefix << DIGIT_BITS | slot as u32;
    }
    let weight = f32::from_bits(prefix);
    let ties = ((wanted - above) / measure(weight)).ceil();
    Cutoff {
        weight,
        // Saturates where the weight is 0: zero weights are never kept anyway.
        ties: ties as usize,
    }
}

/// Appends the positive weights that `cutoff` keeps, with their indices, in order of index.
pub(super) fn gather(weights: &[f32], cutoff: Cutoff, ids: &mut Vec<u32>, kept: &mut Vec<f32>) {
    let mut ties = cutoff.ties;
    for (id, &weight) in weights.iter().enumerate() {
        if weight < cutoff.weight || weight <= 0.0 {
            continue;
        }
        if weight == cutoff.weight {
            if ties == 0 {
                continue;
            }
            ties -= 1;
        }
        ids.push(id as u32);
        kept.push(weight);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn select(weights: &[f32], goal: Goal) -> Vec<u32> {
        let (mut ids, mut kept) = (Vec::new(), Vec::new());
        gather(weights, cutoff(weights, goal), &mut ids, &mut kept);
        ids
    }

    /// By sorting: descending weight, then ascending id.
    fn oracle(weights: &[f32], goal: Goal) -> Vec<u32> {
        let mut order: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let mut mass = 0.0;
        let keep = match goal {
            Goal::Count(count) => count.min(order.len()),
            Goal::Mass(goal) => order
                .iter()
                .take_while(|&&i| {
                    let short = mass < goal;
                    mass += f64::from(weights[i]);
                    short
                })
                .count(),
        };
        let mut ids: Vec<u32> = order[..keep].iter().map(|&i| i as u32).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn ties_go_to_the_lowest_ids() {
        assert_eq!(select(&[0.5, 1.0, 0.5, 0.5], Goal::Count(3)), [0, 1, 2]);
        assert_eq!(select(&[0.5, 0.5, 0.5, 0.5], Goal::Mass(0.9)), [0, 1]);
        assert_eq!(select(&[0.0, 0.0, 1.0], Goal::Count(3)), [2]);
        assert_eq!(select(&[0.25, 1.0], Goal::Mass(99.0)), [0, 1]);
        assert_eq!(select(&[], Goal::Count(3)), Vec::<u32>::new());
    }

    proptest! {
        #[test]
        fn equals_sorting(
            // Multiples of 2⁻¹⁰ make ties frequent and sums exact.
            weights in prop::collection::vec((0_u32..=1024).prop_map(|n| n as f32 / 1024.0), 0..300),
            count in 1_usize..310,
            mass in 0.001_f64..40.0,
        ) {
            prop_assert_eq!(select(&weights, Goal::Count(count)), oracle(&weights, Goal::Count(count)));
            prop_assert_eq!(select(&weights, Goal::Mass(mass)), oracle(&weights, Goal::Mass(mass)));
        }

        #[test]
        fn equals_sorting_over_many_magnitudes(
            weights in prop::collection::vec((-80.0_f32..0.0).prop_map(f32::exp), 1..300),
            count in 1_usize..310,
        ) {
            prop_assert_eq!(select(&weights, Goal::Count(count)), oracle(&weights, Goal::Count(count)));
        }
    }
}
