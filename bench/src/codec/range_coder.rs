//! An adaptive binary range coder with contexts: the size to measure the others by.
//!
//! A position's context is how often it was selected lately, as a decaying sum in 16 levels, with the two decisions
//! just made to its left; eight positions in a row that were not selected lately share one decision while nothing
//! changes. Probabilities move by 1/32 of the error and live as long as the session. The code is a number written
//! from its most significant byte on.

use anyhow::Result;
use specattn_mask::PositionSet;

use super::candidate::Contents;

/// Levels of the decaying sum.
const LEVELS: usize = 16;
/// Decisions to the left that belong to a context.
const LEFT: usize = 2;
/// A decision moves its probability by this power of two of the error.
const RATE: u32 = 5;

/// Models of the encoder and of the decoder, per source.
#[derive(Debug, Default)]
pub struct RangeCoder {
    sent: Vec<Model>,
    received: Vec<Model>,
}

impl Contents for RangeCoder {
    fn put(&mut self, source: usize, _previous: &PositionSet, set: &PositionSet) -> Vec<u8> {
        let model = of_source(&mut self.sent, source);
        let mut encoder = RangeEncoder::new(set);
        model.code(set.len(), &mut encoder);
        model.learn(set);
        encoder.finish()
    }

    fn take(&mut self, source: usize, previous: &PositionSet, bytes: &[u8]) -> Result<PositionSet> {
        let model = of_source(&mut self.received, source);
        let mut decoder = RangeDecoder::new(bytes, previous.len());
        model.code(previous.len(), &mut decoder);
        let set = PositionSet::from_words(previous.len(), decoder.words);
        model.learn(&set);
        Ok(set)
    }
}

fn of_source(models: &mut Vec<Model>, source: usize) -> &mut Model {
    if models.len() <= source {
        models.resize_with(source + 1, Model::default);
    }
    &mut models[source]
}

/// What both ends know of one source.
#[derive(Debug)]
struct Model {
    /// `[positions, up to a multiple of 64]`: 63 more for each selection, a quarter less each round.
    lately: Vec<u8>,
    /// Chance of a selection, in units of 2^-16.
    selected: [u16; LEVELS << LEFT],
    /// Chance that any of eight quiet positions is selected, after two such decisions.
    any: [u16; 4],
}

impl Default for Model {
    fn default() -> Self {
        Self {
            lately: Vec::new(),
            selected: [1 << 14; LEVELS << LEFT],
            any: [1 << 13; 4],
        }
    }
}

/// An end of the code: makes decisions, or follows them.
trait Coder {
    /// Whether any of the eight positions from `8 * byte` on is selected, with its chance.
    fn any(&mut self, byte: usize, chance: &mut u16) -> bool;
    /// Whether `position` is selected, with its chance.
    fn selected(&mut self, position: usize, chance: &mut u16) -> bool;
}

impl Model {
    fn code(&mut self, len: usize, coder: &mut impl Coder) {
        self.lately.resize(len.next_multiple_of(64), 0);
        let (mut left, mut quiet_left) = (0usize, 0usize);
        for (byte, lately) in self
            .lately
            .as_chunks::<8>()
            .0
            .iter()
            .enumerate()
            .take(len.div_ceil(8))
        {
            if u64::from_le_bytes(*lately) & 0xfcfc_fcfc_fcfc_fcfc == 0 {
                let any = coder.any(byte, &mut self.any[quiet_left]);
                quiet_left = (quiet_left << 1 | usize::from(any)) & 3;
                if !any {
                    left = 0;
                    continue;
                }
            }
            for (offset, &lately) in lately.iter().enumerate().take(len - 8 * byte) {
                let context = level(lately) << LEFT | left & ((1 << LEFT) - 1);
                let bit = coder.selected(8 * byte + offset, &mut self.selected[context]);
                left = left << 1 | usize::from(bit);
            }
        }
    }

    fn learn(&mut self, set: &PositionSet) {
        for (lately, word) in self
            .lately
            .as_chunks_mut::<64>()
            .0
            .iter_mut()
            .zip(set.words())
        {
            for (offset, lately) in lately.iter_mut().enumerate() {
                let selected = (word >> offset & 1) as u8;
                *lately = *lately - (*lately >> 2) + 63 * selected;
            }
        }
    }
}

/// 0 never, 1 long ago, then in proportion.
fn level(lately: u8) -> usize {
    match lately {
        0 => 0,
        1..=3 => 1,
        _ => 2 + ((usize::from(lately) * 14) >> 8),
    }
}

struct RangeEncoder<'a> {
    set: &'a [u64],
    bytes: Vec<u8>,
    low: u64,
    range: u32,
}

impl<'a> RangeEncoder<'a> {
    fn new(set: &'a PositionSet) -> Self {
        Self {
            set: set.words(),
            bytes: Vec::with_capacity(1 << 10),
            low: 0,
            range: u32::MAX,
        }
    }

    #[inline]
    fn encode(&mut self, bit: bool, chance: &mut u16) {
        let ones = (self.range >> 16) * u32::from(*chance);
        if bit {
            self.range = ones;
            *chance += (u16::MAX - *chance) >> RATE;
        } else {
            self.low += u64::from(ones);
            self.range -= ones;
            *chance -= *chance >> RATE;
        }
        while self.range < 1 << 24 {
            self.shift();
            self.range <<= 8;
        }
    }

    fn shift(&mut self) {
        if self.low >> 32 != 0 {
            for byte in self.bytes.iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
        }
        self.bytes.push((self.low >> 24) as u8);
        self.low = (self.low & 0x00ff_ffff) << 8;
    }

    /// Ends the code at the number in the range with the most trailing zeros, which are left away.
    fn finish(mut self) -> Vec<u8> {
        let end = self.low + u64::from(self.range);
        let round = |zeros: u32| (self.low + (1 << zeros) - 1) >> zeros << zeros;
        self.low = (0..=32)
            .rev()
            .map(round)
            .find(|&low| low < end)
            .unwrap_or(self.low);
        for _ in 0..4 {
            self.shift();
        }
        let used = self
            .bytes
            .iter()
            .rposition(|&b| b != 0)
            .map_or(0, |i| i + 1);
        self.bytes.truncate(used);
        self.bytes
    }
}

impl Coder for RangeEncoder<'_> {
    fn any(&mut self, byte: usize, chance: &mut u16) -> bool {
        let any = (self.set[byte / 8] >> (8 * (byte % 8))) as u8 != 0;
        self.encode(any, chance);
        any
    }

    #[inline]
    fn selected(&mut self, position: usize, chance: &mut u16) -> bool {
        let bit = self.set[position / 64] >> (position % 64) & 1 == 1;
        self.encode(bit, chance);
        bit
    }
}

struct RangeDecoder<'a> {
    bytes: std::slice::Iter<'a, u8>,
    code: u32,
    range: u32,
    words: Vec<u64>,
}

impl<'a> RangeDecoder<'a> {
    fn new(bytes: &'a [u8], len: usize) -> Self {
        let words = vec![0; len.div_ceil(64)];
        let mut decoder = Self {
            bytes: bytes.iter(),
            code: 0,
            range: u32::MAX,
            words,
        };
        for _ in 0..4 {
            decoder.pull();
        }
        decoder
    }

    #[inline]
    fn decode(&mut self, chance: &mut u16) -> bool {
        let ones = (self.range >> 16) * u32::from(*chance);
        let bit = self.code < ones;
        if bit {
            self.range = ones;
            *chance += (u16::MAX - *chance) >> RATE;
        } else {
            self.code -= ones;
            self.range -= ones;
            *chance -= *chance >> RATE;
        }
        while self.range < 1 << 24 {
            self.pull();
            self.range <<= 8;
        }
        bit
    }

    fn pull(&mut self) {
        self.code = self.code << 8 | u32::from(self.bytes.next().copied().unwrap_or(0));
    }
}

impl Coder for RangeDecoder<'_> {
    fn any(&mut self, _byte: usize, chance: &mut u16) -> bool {
        self.decode(chance)
    }

    #[inline]
    fn selected(&mut self, position: usize, chance: &mut u16) -> bool {
        let bit = self.decode(chance);
        self.words[position / 64] |= u64::from(bit) << (position % 64);
        bit
    }
}
