//! The mask within a frame: the changed groups of each source as gaps, range coded.

use super::range_coder::{Probability, RangeDecoder, RangeEncoder};
use crate::position_set::PositionSet;

/// What both ends know before a mask.
#[derive(Debug, Clone)]
pub(super) struct State {
    previous: Vec<PositionSet>,
    gaps: GapModel,
}

impl State {
    pub(super) fn new(sources: usize) -> Self {
        Self {
            previous: vec![PositionSet::default(); sources],
            gaps: GapModel::new(),
        }
    }

    pub(super) fn sources(&self) -> usize {
        self.previous.len()
    }

    pub(super) fn encode(&mut self, groups: &[PositionSet]) -> Vec<u8> {
        let mut coder = RangeEncoder::new();
        for (previous, set) in self.previous.iter().zip(groups) {
            let mut previous = previous.clone();
            previous.resize(set.len());
            let words = previous.words().iter().zip(set.words()).map(|(a, b)| a ^ b);
            let changed = PositionSet::from_words(set.len(), words.collect());
            let mut next = 0;
            for position in changed.iter() {
                self.gaps.encode(&mut coder, (position - next) as u32);
                next = position + 1;
            }
            if next < set.len() {
                self.gaps.encode(&mut coder, (set.len() - next) as u32);
            }
        }
        coder.finish()
    }

    pub(super) fn decode(&mut self, payload: &[u8], len: usize) -> Vec<PositionSet> {
        let mut coder = RangeDecoder::new(payload);
        let mut sources = Vec::with_capacity(self.previous.len());
        for previous in &self.previous {
            let mut set = previous.clone();
            set.resize(len);
            let mut next = 0;
            while next < len {
                next = next.saturating_add(self.gaps.decode(&mut coder) as usize);
                set.toggle(next);
                next = next.saturating_add(1);
            }
            sources.push(set);
        }
        sources
    }

    pub(super) fn advance(&mut self, groups: Vec<PositionSet>) {
        self.previous = groups;
    }
}

#[derive(Debug, Clone)]
struct GapModel {
    exponent: [Probability; 32],
}

impl GapModel {
    fn new() -> Self {
        Self {
            exponent: [Probability::EVEN; 32],
        }
    }

    fn encode(&mut self, coder: &mut RangeEncoder, gap: u32) {
        let exponent = (gap + 1).ilog2();
        for step in 0..exponent {
            coder.encode(true, &mut self.exponent[step as usize]);
        }
        coder.encode(false, &mut self.exponent[exponent as usize]);
        coder.encode_raw(gap + 1 - (1 << exponent), exponent);
    }

    fn decode(&mut self, coder: &mut RangeDecoder<'_>) -> u32 {
        let mut exponent = 0;
        while exponent < 30 && coder.decode(&mut self.exponent[exponent as usize]) {
            exponent += 1;
        }
        (1 << exponent) + coder.decode_raw(exponent) - 1
    }
}
