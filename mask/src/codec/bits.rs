//! Bit strings with Rice codes, least significant bit first.
//!
//! The Rice code of `n` with parameter `k` is `n >> k` zeros, a one, then the low `k` bits of `n`.

/// Largest Rice parameter.
pub(super) const MAX_PARAMETER: u32 = 14;

/// Most zeros written or read at once.
const RUN: u32 = 32;

/// Writes bits to bytes.
#[derive(Debug, Default)]
pub(super) struct BitWriter {
    bytes: Vec<u8>,
    /// The last `used` bits, not yet in `bytes`; always fewer than 8 between calls.
    pending: u64,
    used: u32,
}

impl BitWriter {
    /// Writes the low `count <= 56` bits of `value`, whose other bits are zero.
    pub(super) fn put(&mut self, value: u64, count: u32) {
        self.pending |= value << self.used;
        self.used += count;
        let whole = self.used / 8;
        self.bytes
            .extend_from_slice(&self.pending.to_le_bytes()[..whole as usize]);
        self.pending = self.pending.checked_shr(8 * whole).unwrap_or(0);
        self.used %= 8;
    }

    /// Writes the Rice code of `n` with parameter `k <= MAX_PARAMETER`.
    pub(super) fn put_rice(&mut self, n: u32, k: u32) {
        let mut zeros = n >> k;
        while zeros > RUN {
            self.put(0, RUN);
            zeros -= RUN;
        }
        let low = u64::from(n) & ((1 << k) - 1);
        self.put((low << 1 | 1) << zeros, zeros + 1 + k);
    }

    /// The bytes, the last one filled up with zeros.
    pub(super) fn finish(mut self) -> Vec<u8> {
        if self.used > 0 {
            self.bytes.push(self.pending as u8);
        }
        self.bytes
    }
}

/// Reads bits from bytes; `None` past their end.
#[derive(Debug)]
pub(super) struct BitReader<'a> {
    bytes: &'a [u8],
    /// Bits read.
    position: usize,
}

impl<'a> BitReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    /// Reads `count <= 56` bits.
    pub(super) fn take(&mut self, count: u32) -> Option<u64> {
        let bits = self.peek() & ((1 << count) - 1);
        self.skip(count)?;
        Some(bits)
    }

    /// Reads a Rice code with parameter `k <= MAX_PARAMETER`; numbers past `u32::MAX` saturate.
    pub(super) fn take_rice(&mut self, k: u32) -> Option<u32> {
        let mut high = 0u32;
        loop {
            let bits = self.peek();
            let zeros = bits.trailing_zeros();
            if zeros <= RUN {
                let low = (bits >> (zeros + 1)) as u32 & ((1 << k) - 1);
                self.skip(zeros + 1 + k)?;
                let high = high.saturating_add(zeros);
                return Some(high.saturating_mul(1 << k).saturating_add(low));
            }
            self.skip(RUN)?;
            high = high.saturating_add(RUN);
        }
    }

    /// Whether nothing but the zeros that fill up the last byte is left.
    pub(super) fn is_finished(&self) -> bool {
        self.position.div_ceil(8) == self.bytes.len() && self.peek() == 0
    }

    /// At least the next 57 bits; zeros past the end.
    fn peek(&self) -> u64 {
        let rest = self.bytes.get(self.position / 8..).unwrap_or_default();
        let next = match rest.first_chunk::<8>() {
            Some(next) => *next,
            None => {
                let mut next = [0; 8];
                next[..rest.len()].copy_from_slice(rest);
                next
            }
        };
        u64::from_le_bytes(next) >> (self.position % 8)
    }

    fn skip(&mut self, count: u32) -> Option<()> {
        self.position += count as usize;
        (self.position <= 8 * self.bytes.len()).then_some(())
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
            (value, count) in (any::<u64>(), 0u32..=56),
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
                prop_assert_eq!(reader.take_rice(k), Some(n));
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
