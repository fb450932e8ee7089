//! Binary range coder with adaptive probabilities.
//!
//! The code is a number in [0, 1), written as bytes from the most significant on; a decoder reads zeros past its end,
//! so the encoder leaves trailing zeros away. [`Probability`] is the chance of a 1 in 16 bits; decisions cost its
//! logarithm, whatever the adaptation, as long as both sides adapt alike.

/// Bits of a probability.
const PROBABILITY_BITS: u32 = 16;

/// Below this width of the range another byte is fixed. Keeps 8 bits more than probabilities have.
const MIN_RANGE: u32 = 1 << 24;

/// The chance of a 1 in a given context, learnt from the decisions made in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Probability {
    /// Chance of a 1 in units of 2^-16, kept within [1/512, 511/512].
    one: u16,
    /// Decisions seen, up to the slowest rate.
    seen: u8,
}

impl Probability {
    /// Slowest adaptation: a step of 1/2^RATE_LIMIT of the error.
    const SLOWEST: u8 = 126;
    /// No event is held to be rarer than this, in units of 2^-16.
    const FLOOR: u16 = 64;

    /// An even chance, ready to move fast.
    pub(crate) const EVEN: Self = Self {
        one: 1 << 15,
        seen: 0,
    };

    /// Moves towards `bit` by 1/(n + 1.5) at the n-th decision, and not slower than 1/(SLOWEST + 1.5).
    #[inline]
    fn learn(&mut self, bit: bool) {
        let goal = if bit {
            i32::from(u16::MAX - Self::FLOOR)
        } else {
            i32::from(Self::FLOOR)
        };
        let step = (goal - i32::from(self.one)) * 2 / (2 * i32::from(self.seen) + 3);
        self.one = (i32::from(self.one) + step) as u16;
        self.seen += u8::from(self.seen < Self::SLOWEST);
    }
}

/// Writes decisions.
#[derive(Debug)]
pub(crate) struct RangeEncoder {
    bytes: Vec<u8>,
    /// Lower end of the range below `bytes`; bit 32 is a carry into them.
    low: u64,
    range: u32,
}

impl RangeEncoder {
    pub(crate) fn new() -> Self {
        Self {
            bytes: Vec::new(),
            low: 0,
            range: u32::MAX,
        }
    }

    /// Writes a decision and learns from it.
    #[inline]
    pub(crate) fn encode(&mut self, bit: bool, probability: &mut Probability) {
        let ones = (self.range >> PROBABILITY_BITS) * u32::from(probability.one);
        if bit {
            self.range = ones;
        } else {
            self.low += u64::from(ones);
            self.range -= ones;
        }
        probability.learn(bit);
        while self.range < MIN_RANGE {
            self.shift();
            self.range <<= 8;
        }
    }

    /// Writes the low `count` bits of `value`, the most significant first, at even chances.
    pub(crate) fn encode_raw(&mut self, value: u32, count: u32) {
        for index in (0..count).rev() {
            self.encode(value >> index & 1 == 1, &mut Probability::EVEN.clone());
        }
    }

    /// The shortest bytes that decode to what was written.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        // Any number in [low, low + range) will do: take the one with the most trailing zeros.
        let end = self.low + u64::from(self.range);
        for zeros in (0..=32).rev() {
            let rounded = (self.low + (1 << zeros) - 1) >> zeros << zeros;
            if rounded < end {
                self.low = rounded;
                break;
            }
        }
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

    fn shift(&mut self) {
        if self.low >> 32 != 0 {
            // The code stays below 1, so some byte takes the carry.
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
}

/// Reads decisions. Any bytes are some sequence of decisions.
#[derive(Debug)]
pub(crate) struct RangeDecoder<'a> {
    bytes: std::slice::Iter<'a, u8>,
    /// The code less the lower end of the range.
    code: u32,
    range: u32,
}

impl<'a> RangeDecoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self {
            bytes: bytes.iter(),
            code: 0,
            range: u32::MAX,
        };
        for _ in 0..4 {
            decoder.pull();
        }
        decoder
    }

    /// Reads a decision and learns from it.
    #[inline]
    pub(crate) fn decode(&mut self, probability: &mut Probability) -> bool {
        let ones = (self.range >> PROBABILITY_BITS) * u32::from(probability.one);
        let bit = self.code < ones;
        if bit {
            self.range = ones;
        } else {
            self.code -= ones;
            self.range -= ones;
        }
        probability.learn(bit);
        while self.range < MIN_RANGE {
            self.pull();
            self.range <<= 8;
        }
        bit
    }

    /// Reads `count` bits written at even chances.
    pub(crate) fn decode_raw(&mut self, count: u32) -> u32 {
        (0..count).fold(0, |value, _| {
            value << 1 | u32::from(self.decode(&mut Probability::EVEN.clone()))
        })
    }

    fn pull(&mut self) {
        self.code = self.code << 8 | u32::from(self.bytes.next().copied().unwrap_or(0));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips(decisions in prop::collection::vec((any::<bool>(), 0usize..3), 0..2_000)) {
            let mut contexts = [Probability::EVEN; 3];
            let mut encoder = RangeEncoder::new();
            for &(bit, context) in &decisions {
                encoder.encode(bit, &mut contexts[context]);
            }
            encoder.encode_raw(0x2a5, 10);
            let bytes = encoder.finish();
            let mut contexts = [Probability::EVEN; 3];
            let mut decoder = RangeDecoder::new(&bytes);
            for &(bit, context) in &decisions {
                prop_assert_eq!(decoder.decode(&mut contexts[context]), bit);
            }
            prop_assert_eq!(decoder.decode_raw(10), 0x2a5);
        }

        #[test]
        fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut contexts = [Probability::EVEN; 2];
            let mut decoder = RangeDecoder::new(&bytes);
            for index in 0..2_000 {
                decoder.decode(&mut contexts[index % 2]);
            }
        }
    }

    #[test]
    fn skewed_decisions_cost_little() {
        let mut context = Probability::EVEN;
        let mut encoder = RangeEncoder::new();
        for index in 0..10_000 {
            encoder.encode(index % 100 == 0, &mut context);
        }
        // The order-0 entropy is 101 bytes; adaptation costs some.
        assert!(encoder.finish().len() < 125);
    }

    #[test]
    fn nothing_takes_no_bytes() {
        assert!(RangeEncoder::new().finish().is_empty());
    }
}
