//! [`Selections`]: bits as a GPU hands them out of attention that is spread over a whole context.
//!
//! From one captured step to the next a position keeps its bit with the chance `repeat`, and is else drawn anew with the row's
//! share: scattered bits, some of them stable, which is what selections of attention that has no few heavy entries look like.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use specattn_engine::SelectedRows;

/// A row's worth of chances, in 256ths.
const CHANCES: f64 = 256.0;

/// A stream of selections of one session.
#[derive(Debug)]
pub struct Selections {
    /// Share of positions that a row selects, by row.
    shares: Vec<f64>,
    repeat: f64,
    rng: StdRng,
    last: SelectedRows,
}

impl Selections {
    /// Rows that select these shares of positions.
    pub fn new(shares: Vec<f64>, repeat: f64, seed: u64) -> Self {
        Self {
            shares,
            repeat,
            rng: StdRng::seed_from_u64(seed),
            last: SelectedRows::default(),
        }
    }

    /// The next step's, over `kv_len` positions.
    pub fn next(&mut self, kv_len: usize) -> SelectedRows {
        let (before, words) = (self.last.words_per_row(), kv_len.div_ceil(64));
        let mut next = SelectedRows {
            kv_len,
            words: Vec::with_capacity(self.shares.len() * words),
        };
        for row in 0..self.shares.len() {
            for word in 0..words {
                let drawn = self.word(self.shares[row]);
                let kept = if word < before {
                    self.word(self.repeat)
                } else {
                    0
                };
                let old = self.last.words.get(row * before + word).copied();
                let bits = (old.unwrap_or_default() & kept) | (drawn & !kept);
                let used = (kv_len - 64 * word).min(64);
                next.words.push(bits & (u64::MAX >> (64 - used)));
            }
        }
        self.last = next.clone();
        next
    }

    /// 64 bits, each of them set with this chance, to a 256th.
    fn word(&mut self, chance: f64) -> u64 {
        let chance = (chance * CHANCES).round() as u32;
        if chance >= 256 {
            return u64::MAX;
        }
        // Bit by bit of the chance, the least first: a coin decides between what the bits below gave and this one.
        (0..8).fold(0, |below, bit| {
            let coin: u64 = self.rng.random();
            if chance >> bit & 1 == 1 {
                below | coin
            } else {
                below & coin
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_their_shares_and_repeat_themselves() {
        let kv_len = 10_000;
        let mut selections = Selections::new(vec![0.25, 0.75], 0.5, 7);
        let first = selections.next(kv_len);
        let second = selections.next(kv_len);
        let count = |words: &mut dyn Iterator<Item = u64>| {
            f64::from(words.map(u64::count_ones).sum::<u32>()) / kv_len as f64
        };
        for (row, share) in [(0, 0.25), (1, 0.75)] {
            let (a, b) = (first.row(row), second.row(row));
            for words in [a, b] {
                assert!((count(&mut words.iter().copied()) - share).abs() < 0.02);
            }
            let both = count(&mut a.iter().zip(b).map(|(a, b)| a & b));
            let expected = 0.5 * share + 0.5 * share * share;
            assert!((both - expected).abs() < 0.02, "{both} {expected}");
            assert_eq!(a[kv_len / 64] >> (kv_len % 64), 0);
        }
    }
}
