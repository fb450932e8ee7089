//! What both ends remember of one source: its selections in the last [`ROUNDS`] rounds, newest first.
//!
//! In how many of them a group was selected tells well how likely it is to be selected now, much better than the last
//! round alone: the count gives the group's *class*. Counts that behave alike share a class, since each class costs time
//! and bytes. Counting goes by bit slices, 64 groups at a time.

use specattn_positions::PositionSet;

/// Rounds remembered: as many as three bits count.
pub(super) const ROUNDS: usize = 7;

/// Classes: a group was selected in 0, 1, 2 to 3, 4 to 6, or all 7 of the rounds.
pub(super) const CLASSES: usize = 5;

/// The last selections of one source.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// Bitmaps as in [`PositionSet::words`], at most [`ROUNDS`], newest last. Missing words are zero.
    rounds: std::collections::VecDeque<Vec<u64>>,
}

impl History {
    /// Remembers `set` as the newest round.
    pub(super) fn push(&mut self, set: &PositionSet) {
        let mut oldest = if self.rounds.len() == ROUNDS {
            self.rounds.pop_front().unwrap_or_default()
        } else {
            Vec::new()
        };
        oldest.clear();
        oldest.extend_from_slice(set.words());
        self.rounds.push_back(oldest);
    }

    /// The classes of `len` groups.
    pub(super) fn classes(&self, len: usize) -> Classes {
        let words = len.div_ceil(64);
        let mut counts = vec![[0u64; 3]; words];
        for round in &self.rounds {
            for (count, &selected) in counts.iter_mut().zip(round) {
                // Adds one bit to the three-bit counters.
                let carry = count[0] & selected;
                count[0] ^= selected;
                count[2] |= count[1] & carry;
                count[1] ^= carry;
            }
        }
        Classes { len, counts }
    }
}

/// Class of each group.
#[derive(Debug)]
pub(super) struct Classes {
    len: usize,
    /// Bit slices: bit `b` of group `i`'s count is bit `i % 64` of `counts[i / 64][b]`.
    counts: Vec<[u64; 3]>,
}

impl Classes {
    /// The groups of class `class`, as bitmap words.
    pub(super) fn members(&self, class: usize, into: &mut Vec<u64>) {
        into.clear();
        into.extend(self.counts.iter().map(|&[ones, twos, fours]| match class {
            0 => !ones & !twos & !fours,
            1 => ones & !twos & !fours,
            2 => twos & !fours,
            3 => fours & !(ones & twos),
            _ => ones & twos & fours,
        }));
        let used = self.len % 64;
        if used != 0
            && let Some(last) = into.last_mut()
        {
            *last &= u64::MAX >> (64 - used);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn classes_count_the_last_rounds(
            rounds in prop::collection::vec(
                (0usize..150, prop::collection::vec(0usize..150, 0..60)), 0..12),
            len in 0usize..160,
        ) {
            let sets: Vec<PositionSet> = rounds
                .into_iter()
                .map(|(len, members)| PositionSet::from_positions(len, members))
                .collect();
            let mut history = History::default();
            for set in &sets {
                history.push(set);
            }
            let classes = history.classes(len);
            let last = &sets[sets.len().saturating_sub(ROUNDS)..];
            let mut members = Vec::new();
            for class in 0..CLASSES {
                classes.members(class, &mut members);
                let expected = (0..len).filter(|&i| {
                    let count = last.iter().filter(|set| set.contains(i)).count();
                    [0, 1, 2, 2, 3, 3, 3, 4][count] == class
                });
                let found = PositionSet::from_words(len, members.clone());
                prop_assert_eq!(found.words(), &members[..]);
                prop_assert!(found.iter().eq(expected));
            }
        }
    }
}
