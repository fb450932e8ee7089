//! Bit strings with Rice codes, least significant bit first.
//!
//! The Rice code of `n` with parameter `k` is `n >> k` zeros, a one, then the low `k` bits of `n`.

/// Largest Rice parameter.
pub(super) const MAX_PARAMETER: u32 = 14;

/// Most bits of a code that are handled at once.
const CHUNK: u32 = 32;

/// Writes bits to bytes.
#[derive(Debug, Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    /// The last `used < CHUNK` bits, not yet in `bytes`.
    pending: u64,
    used: u32,
}

impl BitWriter {
    /// Writes the low `count <= CHUNK` bits of `value`, whose other bits are zero.
    #[inline]
    pub(super) fn put(&mut self, value: u64, count: u32) {
        self.pending |= value << self.used;
        self.used += count;
        if self.used >= CHUNK {
            self.bytes.extend((self.pending as u32).to_le_bytes());
            self.pending >>= CHUNK;
            self.used -= CHUNK;
        }
    }

    /// Writes the Rice code of `n` with parameter `k <= MAX_PARAMETER`.
    #[inline]
    pub(super) fn put_rice(&mut self, n: u32, k: u32) {
        let mut zeros = n >> k;
        while zeros + 1 + k > CHUNK {
            let some = zeros.min(CHUNK);
            self.put(0, some);
            zeros -= some;
        }
        let low = u64::from(n) & ((1 << k) - 1);
        self.put((low << 1 | 1) << zeros, zeros + 1 + k);
    }

    /// The bytes, the last one filled up with zeros.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let left = self.used.div_ceil(8) as usize;
        self.bytes.extend(&self.pending.to_le_bytes()[..left]);
        self.bytes
    }
}

/// Reads bits from bytes; `None` past their end.
#[derive(Debug)]
pub(super) struct BitReader {
    /// The bytes and [`PADDING`] zeros, so that a whole word can be read at any bit.
    padded: Vec<u8>,
    /// Bits read.
    position: usize,
}

const PADDING: usize = size_of::<u64>();

impl BitReader {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self {
            padded: [bytes, &[0; PADDING]].concat(),
            position: 0,
        }
    }

    /// Reads `count <= CHUNK` bits.
    #[inline]
    pub(super) fn take(&mut self, count: u32) -> Option<u64> {
        let bits = self.peek()? & ((1 << count) - 1);
        self.position += count as usize;
        (self.position <= self.end()).then_some(bits)
    }

    /// Reads a Rice code with parameter `k <= MAX_PARAMETER`.
    #[inline]
    pub(super) fn take_rice(&mut self, k: u32) -> Option<u64> {
        let mut high = 0;
        loop {
            let bits = self.peek()?;
            let zeros = bits.trailing_zeros();
            if zeros < CHUNK {
                let low = bits >> (zeros + 1) & ((1 << k) - 1);
                self.position += (zeros + 1 + k) as usize;
                // At most as many zeros as there are bits: the shift keeps them all.
                let number = (high + u64::from(zeros)) << k | low;
                return (self.position <= self.end()).then_some(number);
            }
            self.position += CHUNK as usize;
            high += u64::from(CHUNK);
        }
    }

    /// Whether nothing but the zeros that fill up the last byte is left.
    pub(super) fn is_finished(&self) -> bool {
        self.position.next_multiple_of(8) == self.end() && self.peek() == Some(0)
    }

    /// Bits there are.
    fn end(&self) -> usize {
        8 * (self.padded.len() - PADDING)
    }

    /// At least the next 57 bits; zeros past the end.
    #[inline]
    fn peek(&self) -> Option<u64> {
        let next = self.padded.get(self.position / 8..)?.first_chunk()?;
        Some(u64::from_le_bytes(*next) >> (self.position % 8))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn round_trips(
            numbers in prop::collection::vec((any::<u32>(), 0u32..32, 0..=MAX_PARAMETER), 0..200),
            (value, count) in (any::<u64>(), 0..=CHUNK),
        ) {
            // Keep unary parts short: they are as long as the number says.
            let numbers: Vec<(u32, u32)> = numbers
                .into_iter()
                .map(|(n, shift, k)| (n.unbounded_shr(shift).min(200 << k), k))
                .collect();
            let value = value & ((1 << count) - 1);
            let mut writer = BitWriter::default();
            for &(n, k) in &numbers {
                writer.put_rice(n, k);
            }
            writer.put(value, count);
            let bytes = writer.finish();
            let mut reader = BitReader::new(&bytes);
            for &(n, k) in &numbers {
                prop_assert_eq!(reader.take_rice(k), Some(u64::from(n)));
            }
            prop_assert_eq!(reader.take(count), Some(value));
            prop_assert!(reader.is_finished());
        }

        #[test]
        fn any_bytes_end(bytes in prop::collection::vec(any::<u8>(), 0..50), k in 0..=MAX_PARAMETER) {
            let mut reader = BitReader::new(&bytes);
            let numbers = std::iter::from_fn(|| reader.take_rice(k)).count();
            prop_assert!(numbers <= 8 * bytes.len());
        }
    }

    #[test]
    fn zeros_without_end_are_no_number() {
        assert_eq!(BitReader::new(&[0; 100]).take_rice(3), None);
    }
}
