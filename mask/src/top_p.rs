//! Sorting-free top-p selection of one attention row.
//!
//! **Arithmetic.** The mass of a row at threshold `t` is `mass(t) = Σ x[i] over x[i] >= t`, summed thus: the row is
//! cut into blocks of [`BLOCK`] entries; a block adds its entries in order into [`LANES`] f32 sums, entry `i` into sum
//! `i % LANES`, with 0 for an entry below `t`; the sums are added in order as f64, and blocks are added in order as
//! f64. The row's total is `mass` at the smallest positive f32. A selection is `{ i : x[i] >= t }` for the **largest**
//! `t` with `mass(t) >= p * total` (that product in f64).
//!
//! **Why bisection is exact.** Rounded addition is monotone in both operands, so raising `t`, which turns some addends
//! into 0, never raises `mass(t)`: the condition holds below one threshold and fails above it, rounding included. The
//! bits of positive floats order as the floats do, so the search bisects bit patterns. Once few entries lie between the
//! bounds, it bisects over those alone to guess the answer, then proves the guess on the whole row.
//!
//! NaN and negative entries fail every comparison with a positive threshold: they weigh nothing and are never
//! selected. With an infinite total, the infinite entries are the selection.

use specattn_positions::PositionSet;

/// Parallel f32 sums of a block.
pub const LANES: usize = 16;

/// Entries per block: 128 additions per lane bound the rounding error of a block to 1e-5 of its mass.
pub const BLOCK: usize = 2_048;

/// Entries between the bounds at which the search turns from the row to those entries.
const FEW: usize = 64;

/// Bits of the smallest positive f32.
const SMALLEST: u32 = 1;

/// What [`select_top_p`] found in one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Selection {
    /// Entries at or above the threshold, those past the set's universe included.
    pub kept: usize,
    /// The threshold: the smallest kept entry. Infinite when nothing is kept.
    pub threshold: f32,
    /// Mass of the kept entries.
    pub mass: f64,
    /// Mass of all positive entries.
    pub total: f64,
}

/// Adds to `into` the top-p selection of `row`: the positions of the entries at or above the largest threshold whose
/// mass is at least `p` of the row's total, as the module defines them. Entries equal to the threshold stay together.
///
/// Positions at or past `into.len()` are weighed but not added: they are the round's own inputs. `p >= 1` keeps every
/// positive entry; a row without positive entries, and `p` that is NaN or not positive, keeps nothing.
pub fn select_top_p(row: &[f32], p: f32, into: &mut PositionSet) -> Selection {
    let smallest = f32::from_bits(SMALLEST);
    let (total, positive) = weigh(row, smallest);
    let nothing = Selection {
        kept: 0,
        threshold: f32::INFINITY,
        mass: 0.0,
        total,
    };
    if positive == 0 || p.is_nan() || p <= 0.0 {
        return nothing;
    }
    let found = if p >= 1.0 {
        Bound {
            bits: SMALLEST,
            mass: total,
            kept: positive,
        }
    } else {
        search(row, f64::from(p) * total, total, positive)
    };
    let threshold = f32::from_bits(found.bits);
    add_entries(row, threshold, into);
    Selection {
        kept: found.kept,
        threshold,
        mass: found.mass,
        total,
    }
}

/// A threshold and what lies at or above it.
#[derive(Debug, Clone, Copy)]
struct Bound {
    /// The threshold's bit pattern.
    bits: u32,
    mass: f64,
    kept: usize,
}

impl Bound {
    fn at(row: &[f32], bits: u32) -> Self {
        let (mass, kept) = weigh(row, f32::from_bits(bits));
        Self { bits, mass, kept }
    }
}

/// The largest threshold whose mass reaches `wanted`. `total > 0` and `positive > 0` describe the whole row.
fn search(row: &[f32], wanted: f64, total: f64, positive: usize) -> Bound {
    // Invariant: mass(reaches) >= wanted > mass(fails).
    let mut reaches = Bound {
        bits: SMALLEST,
        mass: total,
        kept: positive,
    };
    let mut fails = Bound {
        bits: f32::INFINITY.to_bits() + 1,
        mass: 0.0,
        kept: 0,
    };
    // The answer of an attention row lies within a few powers of two of the mean entry: gallop from there until it is
    // bracketed, which spares bisecting 31 bits from scratch.
    let mut probe = (total / positive as f64) as f32;
    let mut stride = 4.0f32;
    while (reaches.bits + 1..fails.bits).contains(&probe.to_bits()) {
        let bound = Bound::at(row, probe.to_bits());
        if bound.mass >= wanted {
            reaches = bound;
            probe *= stride;
        } else {
            fails = bound;
            probe /= stride;
        }
        stride *= stride;
    }
    while fails.bits - reaches.bits > 1 && reaches.kept - fails.kept > FEW {
        let bound = Bound::at(row, reaches.bits + (fails.bits - reaches.bits) / 2);
        if bound.mass >= wanted {
            reaches = bound;
        } else {
            fails = bound;
        }
    }
    settle(row, wanted, reaches, fails)
}

/// Ends the search among the entries in `[reaches, fails)`, of which there is at least one, since the masses differ.
fn settle(row: &[f32], wanted: f64, reaches: Bound, fails: Bound) -> Bound {
    let few = entries_between(row, reaches, fails);
    // Bounds as before, with the number of the few at or above them.
    let (mut low, mut high) = ((reaches.bits, few.len()), (fails.bits, 0));
    while high.0 - low.0 > 1 && low.1 - high.1 > 1 {
        let middle = low.0 + (high.0 - low.0) / 2;
        // Only a guess: these sums do not add in the row's order.
        let (mass, kept) = weigh(&few, f32::from_bits(middle));
        if fails.mass + mass >= wanted {
            low = (middle, kept);
        } else {
            high = (middle, kept);
        }
    }
    // The answer is an entry, so step from entry to entry until one reaches and the next does not.
    let mut best = Bound::at(row, smallest_from(&few, low.0).unwrap_or(reaches.bits));
    if best.mass >= wanted {
        while let Some(next) = smallest_from(&few, best.bits + 1) {
            let bound = Bound::at(row, next);
            if bound.mass < wanted {
                break;
            }
            best = bound;
        }
        return best;
    }
    while let Some(next) = largest_below(&few, best.bits) {
        best = Bound::at(row, next);
        if best.mass >= wanted {
            break;
        }
    }
    best
}

/// The smallest bit pattern of `entries` that is at least `bits`.
fn smallest_from(entries: &[f32], bits: u32) -> Option<u32> {
    let patterns = entries.iter().map(|x| x.to_bits());
    patterns.filter(|&b| b >= bits).min()
}

/// The largest bit pattern of `entries` below `bits`.
fn largest_below(entries: &[f32], bits: u32) -> Option<u32> {
    let patterns = entries.iter().map(|x| x.to_bits());
    patterns.filter(|&b| b < bits).max()
}

/// Mass and number of the entries of `row` at or above the positive threshold `t`.
fn weigh(row: &[f32], t: f32) -> (f64, usize) {
    let (mut mass, mut kept) = (0.0f64, 0usize);
    for block in row.chunks(BLOCK) {
        let (vectors, rest) = block.as_chunks::<LANES>();
        // Zeros are below every threshold. A whole last vector keeps the sums in registers.
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sums = [0.0f32; LANES];
        let mut counts = [0u32; LANES];
        for vector in vectors.iter().chain([&last]) {
            for lane in 0..LANES {
                let keep = vector[lane] >= t;
                sums[lane] += if keep { vector[lane] } else { 0.0 };
                counts[lane] += u32::from(keep);
            }
        }
        mass += sums.iter().map(|&sum| f64::from(sum)).sum::<f64>();
        kept += counts.iter().sum::<u32>() as usize;
    }
    (mass, kept)
}

/// The entries at or above `reaches` and below `fails`.
fn entries_between(row: &[f32], reaches: Bound, fails: Bound) -> Vec<f32> {
    let span = fails.bits - reaches.bits;
    // Bit patterns of NaN and of negative numbers are above every bound.
    let between = |x: f32| x.to_bits().wrapping_sub(reaches.bits) < span;
    // One more than there are: an entry is written first and kept if it counts, which spares mispredicted branches.
    let mut entries = vec![0.0; reaches.kept - fails.kept + 1];
    let mut found = 0;
    for vector in row.chunks(LANES) {
        // Most vectors have none: their sum is cheaper than looking at each entry.
        if vector.iter().map(|&x| u32::from(between(x))).sum::<u32>() > 0 {
            for &x in vector {
                entries[found] = x;
                found += usize::from(between(x));
            }
        }
    }
    entries.truncate(found);
    entries
}

/// Adds to `set` the positions below its length of the entries at or above `t`.
fn add_entries(row: &[f32], t: f32, set: &mut PositionSet) {
    let row = &row[..row.len().min(set.len())];
    for (index, chunk) in row.chunks(u64::BITS as usize).enumerate() {
        let mut keep = [0u8; u64::BITS as usize];
        for (flag, &x) in keep.iter_mut().zip(chunk) {
            *flag = u8::from(x >= t);
        }
        let mut word = 0;
        for (byte, flags) in keep.as_chunks::<8>().0.iter().enumerate() {
            // The product moves flag i of the eight to bit 56 + i.
            let bits = u64::from_le_bytes(*flags).wrapping_mul(0x0102_0408_1020_4080) >> 56;
            word |= bits << (8 * byte);
        }
        set.union_word(index, word);
    }
}

#[cfg(test)]
mod tests;
