//! [`Prefix`]: the first blocks of a session's tokens, by which it is brought to a verify worker that holds them already,
//! and [`Prefixes`]: which worker that is.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::registry::WorkerId;

/// Lengths at which prefixes are compared: whole KV blocks, up to where sharing saves most of a prompt's work.
const LENGTHS: [usize; 5] = [64, 256, 1_024, 4_096, 16_384];

/// Most prefixes remembered.
const MOST: usize = 8_192;

/// Lengths and hashes of the beginnings of a token list, the longest first. An equal hash of other tokens costs a detour, no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Prefix(Vec<(usize, u64)>);

impl Prefix {
    /// The beginnings of `tokens`; none of a list shorter than a block.
    pub(crate) fn of(tokens: &[u32]) -> Self {
        let mut hasher = DefaultHasher::new();
        let mut hashed = 0;
        let mut hashes = Vec::new();
        for length in LENGTHS.into_iter().take_while(|&n| n <= tokens.len()) {
            tokens[hashed..length].hash(&mut hasher);
            hashed = length;
            hashes.push((length, hasher.finish()));
        }
        hashes.reverse();
        Self(hashes)
    }
}

/// Where prefixes were served last.
#[derive(Debug, Default)]
pub(crate) struct Prefixes {
    workers: HashMap<u64, WorkerId>,
    /// The oldest first.
    order: VecDeque<u64>,
}

impl Prefixes {
    /// Notes where a prefix is served.
    pub(crate) fn served(&mut self, prefix: &Prefix, worker: WorkerId) {
        for &(_, hash) in &prefix.0 {
            if self.workers.insert(hash, worker).is_none() {
                self.order.push_back(hash);
            }
        }
        while self.order.len() > MOST {
            if let Some(oldest) = self.order.pop_front() {
                self.workers.remove(&oldest);
            }
        }
    }

    /// The worker that served the longest part of a prefix, and how many tokens that is.
    pub(crate) fn worker(&self, prefix: &Prefix) -> Option<(WorkerId, usize)> {
        let mut parts = prefix.0.iter();
        parts.find_map(|(length, hash)| Some((*self.workers.get(hash)?, *length)))
    }

    /// A worker is gone, and what it held.
    pub(crate) fn forget(&mut self, worker: WorkerId) {
        self.workers.retain(|_, at| *at != worker);
        let workers = &self.workers;
        self.order.retain(|hash| workers.contains_key(hash));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_common_beginning_counts() {
        let long: Vec<u32> = (0..2_000).collect();
        let mut other = long.clone();
        other[300] = 7;
        let (whole, half) = (Prefix::of(&long), Prefix::of(&other));
        assert_eq!((whole.0.len(), Prefix::of(&long[..63]).0.len()), (3, 0));
        assert_eq!(whole.0[1..], half.0[1..]);
        assert_ne!(whole.0[0], half.0[0]);
        let mut prefixes = Prefixes::default();
        let (a, b) = (WorkerId::verify(1), WorkerId::verify(2));
        prefixes.served(&whole, a);
        assert_eq!(prefixes.worker(&half), Some((a, 256)));
        prefixes.served(&half, b);
        assert_eq!(prefixes.worker(&whole), Some((a, 1_024)));
        prefixes.forget(a);
        assert_eq!(prefixes.worker(&whole), Some((b, 256)));
        assert_eq!(prefixes.worker(&Prefix::of(&long[..63])), None);
    }

    #[test]
    fn memory_is_bounded() {
        let mut prefixes = Prefixes::default();
        for first in 0..2 * MOST as u32 {
            let tokens: Vec<u32> = (first..first + 64).collect();
            prefixes.served(&Prefix::of(&tokens), WorkerId::verify(1));
        }
        assert_eq!((prefixes.workers.len(), prefixes.order.len()), (MOST, MOST));
    }
}
