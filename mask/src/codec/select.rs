//! [`Ranked`]: the members of a bitmap word by rank.
//!
//! Whole words at a time, in ordinary integer arithmetic: a byte of a word counts the members up to and including that
//! byte of the bitmap, so that one subtraction compares a rank with all eight.

/// The lowest bit of each byte.
const LOW: u64 = 0x0101_0101_0101_0101;

/// The highest bit of each byte.
const HIGH: u64 = LOW << 7;

/// `[byte][rank]`: the bit of `byte` that is set and has `rank` set bits below it.
static BIT_OF_RANK: [[u8; 8]; 256] = bit_of_rank();

const fn bit_of_rank() -> [[u8; 8]; 256] {
    let mut table = [[0; 8]; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut bit, mut rank) = (0, 0);
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                table[byte][rank] = bit;
                rank += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    table
}

/// A bitmap word, ready to find members by rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ranked {
    word: u64,
    /// Byte `b`: members in bytes 0 to `b` of `word`.
    up_to: u64,
}

impl Ranked {
    #[inline]
    pub(super) fn new(word: u64) -> Self {
        let pairs = word - (word >> 1 & (LOW * 0x55));
        let quads = (pairs & (LOW * 0x33)) + (pairs >> 2 & (LOW * 0x33));
        let bytes = (quads + (quads >> 4)) & (LOW * 0x0f);
        Self {
            word,
            up_to: bytes.wrapping_mul(LOW),
        }
    }

    /// Number of members.
    #[inline]
    pub(super) fn count(self) -> u32 {
        (self.up_to >> 56) as u32
    }

    /// The member with `rank < count()` members below it, as a word with that one bit.
    #[inline]
    pub(super) fn select(self, rank: u32) -> u64 {
        // The high bit of each byte stays where the members up to that byte do not go beyond the rank: the member lies
        // in the first byte where it does not stay.
        let before = (((u64::from(rank) * LOW) | HIGH) - self.up_to) & HIGH;
        let shift = (before >> 7).wrapping_mul(LOW) >> 56 << 3;
        let passed = self.up_to << 8 >> shift & 0xff;
        let byte = (self.word >> shift & 0xff) as usize;
        let bit = BIT_OF_RANK[byte][(u64::from(rank) - passed) as usize & 7];
        1 << (shift + u64::from(bit))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn finds_every_member(word: u64, thin: u64, fill: u64) {
            for word in [word, word & thin, word | fill, 0, u64::MAX, 1 << 63] {
                let ranked = Ranked::new(word);
                prop_assert_eq!(ranked.count(), word.count_ones());
                let members = (0..64).map(|bit| 1u64 << bit).filter(|bit| word & bit != 0);
                for (rank, bit) in members.enumerate() {
                    prop_assert_eq!(ranked.select(rank as u32), bit);
                }
            }
        }
    }
}
