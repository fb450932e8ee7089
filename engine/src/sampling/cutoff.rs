//! Selecting the largest weights by count or by mass, without sorting and without allocating.
//!
//! Non-negative floats order like their bit patterns, and weights up to 1 fit 30 bits, so three radix passes of 10 bits
//! find the exact weight at which the goal is met. Ties at that weight go to the lowest ids. Passes but for the first are about few
//! weights, and so is gathering: whole blocks without any are passed over.

use super::widest::widest;

/// Bits of a radix pass.
const DIGIT_BITS: u32 = 10;
const SLOTS: usize = 1 << DIGIT_BITS;
/// Weights that are passed over at a time.
const BLOCK: usize = 64;

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

    // The digits settled so far, and the measure of the weights above every weight that begins with them.
    let mut prefix = 0_u32;
    let mut above = 0.0;
    for shift in [2 * DIGIT_BITS, DIGIT_BITS, 0] {
        let slots = if shift == 2 * DIGIT_BITS {
            first_digits(weights, shift, measure)
        } else {
            next_digits(weights, shift, prefix, measure)
        };
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

/// The measure of the weights by their first digit. Neighbours are often alike: they are added up in tables of their own, so that none
/// waits for the one before.
fn first_digits(weights: &[f32], shift: u32, measure: impl Fn(f32) -> f64) -> [f64; SLOTS] {
    const TABLES: usize = 4;
    let mut tables = [[0.0_f64; SLOTS]; TABLES];
    let mut add = |table: usize, weight: f32| {
        tables[table][(weight.to_bits() >> shift) as usize % SLOTS] += measure(weight);
    };
    let (chunks, rest) = weights.as_chunks::<TABLES>();
    for chunk in chunks {
        for (table, &weight) in chunk.iter().enumerate() {
            add(table, weight);
        }
    }
    for (table, &weight) in rest.iter().enumerate() {
        add(table, weight);
    }
    let [mut slots, others @ ..] = tables;
    for (index, slot) in slots.iter_mut().enumerate() {
        for table in &others {
            *slot += table[index];
        }
    }
    slots
}

/// The measure by the digit at `shift` of the weights that begin with `prefix`.
fn next_digits(
    weights: &[f32],
    shift: u32,
    prefix: u32,
    measure: impl Fn(f32) -> f64,
) -> [f64; SLOTS] {
    let mut slots = [0.0_f64; SLOTS];
    let least = prefix << (shift + DIGIT_BITS);
    let most = least | ((1 << (shift + DIGIT_BITS)) - 1);
    let bounds = [least, most].map(f32::from_bits);
    for block in weights.chunks(BLOCK) {
        if !has_any_in(block, bounds) {
            continue;
        }
        for &weight in block {
            let bits = weight.to_bits() >> shift;
            if bits >> DIGIT_BITS == prefix {
                slots[bits as usize % SLOTS] += measure(weight);
            }
        }
    }
    slots
}

#[inline(always)]
fn plain_has_any_in(weights: &[f32], [least, most]: [f32; 2]) -> bool {
    let mut any = false;
    for &weight in weights {
        any |= (weight >= least) & (weight <= most);
    }
    any
}

widest! {
    /// Whether any of these weights lies between the bounds, which belong to it.
    fn has_any_in(weights: &[f32], bounds: [f32; 2]) -> bool = plain_has_any_in;
}

/// Appends the positive weights that `cutoff` keeps, with their indices, in order of index.
pub(super) fn gather(weights: &[f32], cutoff: Cutoff, ids: &mut Vec<u32>, kept: &mut Vec<f32>) {
    let mut ties = cutoff.ties;
    for (number, block) in weights.chunks(BLOCK).enumerate() {
        if !has_any_in(block, [cutoff.weight, f32::INFINITY]) {
            continue;
        }
        for (offset, &weight) in block.iter().enumerate() {
            if weight < cutoff.weight || weight <= 0.0 {
                continue;
            }
            if weight == cutoff.weight {
                if ties == 0 {
                    continue;
                }
                ties -= 1;
            }
            ids.push((number * BLOCK + offset) as u32);
            kept.push(weight);
        }
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
