//! [`PositionSet`]: a set of KV cache positions as a bitmap.
//!
//! What masks select, what heads are told to read and what crosses to a GPU are such sets: a bit per position, where an index list
//! would take 32 per entry. The crate stands below `mask` and `engine`, which share nothing else.
//!
//! Position `i` is bit `i % 64` of word `i / 64`. Invariant: there are `ceil(len / 64)` words, and bits at and past
//! `len` are zero, so that words can be compared, counted and combined without masking.

#![forbid(unsafe_code)]

/// Bits per word.
const WORD: usize = u64::BITS as usize;

/// A subset of the positions `[0, len)`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PositionSet {
    len: usize,
    words: Vec<u64>,
}

impl PositionSet {
    /// The empty subset of `[0, len)`.
    pub fn new(len: usize) -> Self {
        Self {
            len,
            words: vec![0; len.div_ceil(WORD)],
        }
    }

    /// The subset of `[0, len)` that holds `positions`; those at or past `len` are ignored.
    pub fn from_positions(len: usize, positions: impl IntoIterator<Item = usize>) -> Self {
        let mut set = Self::new(len);
        for position in positions {
            set.insert(position);
        }
        set
    }

    /// The subset of `[0, len)` given by a bitmap; missing words count as zero, surplus bits are dropped.
    pub fn from_words(len: usize, mut words: Vec<u64>) -> Self {
        words.resize(len.div_ceil(WORD), 0);
        let mut set = Self { len, words };
        set.clear_tail();
        set
    }

    /// Size of the universe `[0, len)`; not the number of members, which is [`count`](Self::count).
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the set has no member.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Number of members.
    pub fn count(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Adds `position`; one at or past [`len`](Self::len) is ignored. Returns whether the set grew.
    pub fn insert(&mut self, position: usize) -> bool {
        if position >= self.len {
            return false;
        }
        let bit = 1 << (position % WORD);
        let word = &mut self.words[position / WORD];
        let absent = *word & bit == 0;
        *word |= bit;
        absent
    }

    /// Adds `position` where it is absent and removes it where it is present; one at or past the universe is ignored.
    pub fn toggle(&mut self, position: usize) {
        if position < self.len {
            self.words[position / WORD] ^= 1 << (position % WORD);
        }
    }

    /// Adds `start..end`, cut to the universe.
    pub fn insert_range(&mut self, start: usize, end: usize) {
        let end = end.min(self.len);
        if start >= end {
            return;
        }
        let (first, last) = (start / WORD, (end - 1) / WORD);
        let head = u64::MAX << (start % WORD);
        let tail = u64::MAX >> (WORD - 1 - (end - 1) % WORD);
        if first == last {
            self.words[first] |= head & tail;
        } else {
            self.words[first] |= head;
            self.words[first + 1..last].fill(u64::MAX);
            self.words[last] |= tail;
        }
    }

    /// Whether `position` is a member.
    pub fn contains(&self, position: usize) -> bool {
        position < self.len && self.words[position / WORD] >> (position % WORD) & 1 == 1
    }

    /// Adds the members of `other`; those at or past this set's [`len`](Self::len) are ignored.
    pub fn union_with(&mut self, other: &Self) {
        self.union_with_words(&other.words);
    }

    /// Adds the positions of `words`, bit i of word w being 64 w + i; those outside the set's universe are left out.
    pub fn union_with_words(&mut self, words: &[u64]) {
        for (word, add) in self.words.iter_mut().zip(words) {
            *word |= add;
        }
        self.clear_tail();
    }

    /// Removes every member.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Changes the universe to `[0, len)`, dropping members at or past it.
    pub fn resize(&mut self, len: usize) {
        self.len = len;
        self.words.resize(len.div_ceil(WORD), 0);
        self.clear_tail();
    }

    /// Members in increasing order.
    pub fn iter(&self) -> Iter<'_> {
        Iter {
            words: &self.words,
            next: 0,
            word: 0,
            base: 0,
        }
    }

    /// The bitmap: position `i` is bit `i % 64` of word `i / 64`; bits at and past `len` are zero.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds the members of a bitmap word that starts at position `64 * index`.
    ///
    /// # Panics
    /// When the universe has no such word.
    pub fn union_word(&mut self, index: usize, bits: u64) {
        self.words[index] |= bits;
        if index + 1 == self.words.len() {
            self.clear_tail();
        }
    }

    /// Extends every group of `granularity` consecutive positions that has a member to all of its positions.
    pub fn fill_groups(&mut self, granularity: usize) {
        if granularity <= 1 {
            return;
        }
        let groups = self.to_groups(granularity);
        for group in groups.iter() {
            self.insert_range(group * granularity, (group + 1) * granularity);
        }
    }

    /// The set of groups of `granularity` consecutive positions that have a member, over `ceil(len / granularity)`.
    pub fn to_groups(&self, granularity: usize) -> Self {
        let granularity = granularity.max(1);
        if granularity == 1 {
            return self.clone();
        }
        Self::from_positions(
            self.len.div_ceil(granularity),
            self.iter().map(|position| position / granularity),
        )
    }

    /// The positions, within `[0, len)`, of a set of groups of `granularity` positions.
    pub fn from_groups(groups: &Self, granularity: usize, len: usize) -> Self {
        let granularity = granularity.max(1);
        if granularity == 1 {
            let mut set = groups.clone();
            set.resize(len);
            return set;
        }
        let mut set = Self::new(len);
        for group in groups.iter() {
            let start = group.saturating_mul(granularity);
            set.insert_range(start, start.saturating_add(granularity));
        }
        set
    }

    fn clear_tail(&mut self) {
        let used = self.len % WORD;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= u64::MAX >> (WORD - used);
        }
    }
}

impl FromIterator<usize> for PositionSet {
    /// The positions, within the smallest universe that holds them.
    fn from_iter<I: IntoIterator<Item = usize>>(positions: I) -> Self {
        let mut set = Self::default();
        for position in positions {
            if position >= set.len {
                set.resize(position + 1);
            }
            set.insert(position);
        }
        set
    }
}

impl<'a> IntoIterator for &'a PositionSet {
    type Item = usize;
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

/// Members of a [`PositionSet`] in increasing order.
#[derive(Debug, Clone)]
pub struct Iter<'a> {
    words: &'a [u64],
    /// Index of the word after the current one.
    next: usize,
    /// Members of the current word not yet given out.
    word: u64,
    /// First position of the current word.
    base: usize,
}

impl Iterator for Iter<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        while self.word == 0 {
            self.word = *self.words.get(self.next)?;
            self.base = self.next * WORD;
            self.next += 1;
        }
        let bit = self.word.trailing_zeros() as usize;
        self.word &= self.word - 1;
        Some(self.base + bit)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_an_ordered_set(
            len in 0usize..300,
            members in prop::collection::vec(0usize..400, 0..80),
            (start, end) in (0usize..350, 0usize..350),
            resized in 0usize..350,
        ) {
            let mut set = PositionSet::from_positions(len, members.iter().copied());
            let mut model: BTreeSet<usize> = members.into_iter().filter(|&m| m < len).collect();
            set.insert_range(start, end);
            model.extend((start..end.max(start)).filter(|&m| m < len));
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert_eq!(set.count(), model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert!((0..400).all(|p| set.contains(p) == model.contains(&p)));
            set.resize(resized);
            model.retain(|&m| m < resized);
            prop_assert!(set.iter().eq(model.iter().copied()));
            prop_assert_eq!(&PositionSet::from_words(resized, set.words().to_vec()), &set);
            let collected: PositionSet = model.iter().copied().collect();
            prop_assert!(collected.iter().eq(model.iter().copied()));
            prop_assert_eq!(collected.len(), model.last().map_or(0, |&last| last + 1));
        }

        #[test]
        fn unions_within_its_universe(
            (a_len, b_len) in (0usize..200, 0usize..200),
            a in prop::collection::vec(0usize..200, 0..40),
            b in prop::collection::vec(0usize..200, 0..40),
        ) {
            let mut union = PositionSet::from_positions(a_len, a.iter().copied());
            union.union_with(&PositionSet::from_positions(b_len, b.iter().copied()));
            let model = PositionSet::from_positions(
                a_len,
                a.iter().copied().chain(b.iter().copied().filter(|&p| p < b_len)),
            );
            prop_assert_eq!(union, model);
        }

        #[test]
        fn groups_hold_all_or_none(
            len in 0usize..300,
            members in prop::collection::vec(0usize..300, 0..30),
            granularity in 1usize..70,
        ) {
            let set = PositionSet::from_positions(len, members.iter().copied());
            let mut filled = set.clone();
            filled.fill_groups(granularity);
            for position in 0..len {
                let start = position / granularity * granularity;
                let any = (start..(start + granularity).min(len)).any(|p| set.contains(p));
                prop_assert_eq!(filled.contains(position), any);
            }
            let groups = filled.to_groups(granularity);
            prop_assert_eq!(PositionSet::from_groups(&groups, granularity, len), filled);
        }
    }
}
