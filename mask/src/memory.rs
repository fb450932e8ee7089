//! The target's own memory: what its KV heads found heavy in the rounds before.
//!
//! A masked round yields the probability of every entry that was read. A head keeps a decaying mean of them, and what
//! carries a share of it is read again in the next round, whatever the draft selects. That costs nothing on the wire
//! and helps most where draft and target disagree: an entry that the draft named once stays for as long as the target
//! uses it.

use serde::{Deserialize, Serialize};

use crate::top_p::select_top_p;
use specattn_positions::PositionSet;

/// Scores below this are forgotten: no selection would reach them, and the memory stays as short as what was read.
const FORGOTTEN: f32 = 1e-6;

/// How a target's heads remember.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRule {
    /// What a round leaves of the scores before it, in `[0, 1)`.
    pub decay: f32,
    /// `[target layers][target KV heads]`: log-odds added to those of the session's p. The sum is the share of its
    /// scores that a head reads again.
    pub p_offset: Vec<Vec<f32>>,
}

/// The mass whose log-odds are `offset` above those of `p`.
pub fn shifted_mass(p: f32, offset: f32) -> f32 {
    if p >= 1.0 || offset == 0.0 {
        return p;
    }
    let odds = p / (1.0 - p) * offset.exp();
    if odds.is_finite() {
        odds / (1.0 + odds)
    } else {
        1.0
    }
}

/// Decaying means of the probabilities of the entries that one KV head read, by position.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadMemory {
    /// Strictly increasing.
    positions: Vec<u32>,
    /// In `(0, 1]`.
    scores: Vec<f32>,
}

impl HeadMemory {
    /// Takes a round's masses: `masses[i]` is the probability of the i-th of the positions `read`, which increase strictly.
    /// Entries that were not read decay as if they had weighed nothing.
    pub fn observe(&mut self, read: impl IntoIterator<Item = usize>, masses: &[f32], decay: f32) {
        let before = std::mem::take(self);
        let known = before.positions.into_iter().zip(before.scores);
        let mut known = known.peekable();
        self.positions.reserve(masses.len());
        self.scores.reserve(masses.len());
        for (position, &mass) in read.into_iter().zip(masses) {
            let position = position as u32;
            while let Some((earlier, score)) = known.next_if(|k| k.0 < position) {
                self.push(earlier, score * decay);
            }
            let score = known.next_if(|k| k.0 == position).map_or(0.0, |k| k.1);
            self.push(position, score * decay + mass * (1.0 - decay));
        }
        for (later, score) in known {
            self.push(later, score * decay);
        }
    }

    fn push(&mut self, position: u32, score: f32) {
        if score >= FORGOTTEN {
            self.positions.push(position);
            self.scores.push(score);
        }
    }

    /// Adds to `set` the positions that carry a share `p` of the scores. Those at or past the set's universe are
    /// ignored: they were rolled back.
    pub fn select(&self, p: f32, set: &mut PositionSet) {
        let mut heavy = PositionSet::new(self.scores.len());
        select_top_p(&self.scores, p, &mut heavy);
        for index in heavy.iter() {
            set.insert(self.positions[index] as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(memory: &HeadMemory, p: f32) -> Vec<usize> {
        let mut set = PositionSet::new(100);
        memory.select(p, &mut set);
        set.iter().collect()
    }

    #[test]
    fn what_was_heavy_is_selected() {
        let mut memory = HeadMemory::default();
        assert!(selected(&memory, 0.9).is_empty());
        memory.observe([2, 5, 9], &[0.1, 0.6, 0.3], 0.5);
        assert_eq!(selected(&memory, 0.5), [5]);
        assert_eq!(selected(&memory, 0.9), [5, 9]);
        assert_eq!(selected(&memory, 1.0), [2, 5, 9]);
    }

    #[test]
    fn what_is_not_read_fades() {
        let mut memory = HeadMemory::default();
        memory.observe([5], &[0.8], 0.5);
        memory.observe([3, 7], &[0.3, 0.7], 0.5);
        // 5 has 0.2, 3 has 0.15, 7 has 0.35.
        assert_eq!(selected(&memory, 0.45), [7]);
        assert_eq!(selected(&memory, 0.75), [5, 7]);
        for _ in 0..30 {
            memory.observe([7], &[1.0], 0.5);
        }
        assert_eq!(selected(&memory, 1.0), [7]);
    }

    #[test]
    fn positions_that_were_rolled_back_are_ignored() {
        let mut memory = HeadMemory::default();
        memory.observe([1, 200], &[0.5, 0.5], 0.0);
        assert_eq!(selected(&memory, 1.0), [1]);
    }

    #[test]
    fn offsets_move_log_odds() {
        assert!((shifted_mass(0.5, 0.0) - 0.5).abs() < 1e-6);
        assert!((shifted_mass(0.9, 1.0) - 0.960_7).abs() < 1e-3);
        assert!(shifted_mass(0.9, -1.0) < 0.9);
        assert_eq!(shifted_mass(1.0, -5.0), 1.0);
        assert_eq!(shifted_mass(0.9, f32::INFINITY), 1.0);
    }
}
