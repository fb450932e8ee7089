//! Rice-coded gaps between changed positions: one byte of parameter, then each gap as a run of zeros, a one and the
//! parameter's bits, least significant bit first.

use anyhow::{Result, ensure};
use specattn_mask::PositionSet;

use super::candidate::{Contents, xor};

/// Plain gap coding: what the kept codec does, without history.
#[derive(Debug)]
pub struct RiceGaps;

impl Contents for RiceGaps {
    fn put(&mut self, _source: usize, previous: &PositionSet, set: &PositionSet) -> Vec<u8> {
        let changed = xor(previous, set);
        let count = changed.count().max(1);
        let parameter = ((changed.len() - changed.count()) / count * 11 / 16 + 1).ilog2();
        let mut bytes = vec![parameter as u8];
        let mut bits = Bits::default();
        let mut next = 0;
        for position in changed.iter().chain([changed.len()]) {
            let gap = (position - next) as u64;
            for _ in 0..gap >> parameter {
                bits.put(&mut bytes, 0, 1);
            }
            bits.put(
                &mut bytes,
                (gap & ((1 << parameter) - 1)) << 1 | 1,
                parameter + 1,
            );
            next = position + 1;
        }
        bits.put(&mut bytes, 0, 7);
        bytes
    }

    fn take(
        &mut self,
        _source: usize,
        previous: &PositionSet,
        bytes: &[u8],
    ) -> Result<PositionSet> {
        ensure!(bytes.first().is_some_and(|&k| k < 32), "no parameter");
        let parameter = u32::from(bytes[0]);
        let mut set = previous.clone();
        let mut at = 8;
        let mut next = 0;
        while next < set.len() {
            let mut gap = 0;
            loop {
                let (zeros, seen) = zeros(bytes, at)?;
                gap += zeros;
                at += seen;
                if seen > zeros {
                    break;
                }
            }
            gap = gap << parameter | (peek(bytes, at) & ((1 << parameter) - 1)) as usize;
            at += parameter as usize;
            set.toggle(next + gap);
            next += gap + 1;
        }
        Ok(set)
    }
}

/// Zeros before the next one, and bits to pass: one more than the zeros where the one was seen.
fn zeros(bytes: &[u8], at: usize) -> Result<(usize, usize)> {
    ensure!(at < 8 * bytes.len(), "truncated");
    let zeros = peek(bytes, at).trailing_zeros().min(56) as usize;
    Ok((zeros, if zeros < 56 { zeros + 1 } else { zeros }))
}

/// At least 57 bits from bit `at` on; zeros past the end.
fn peek(bytes: &[u8], at: usize) -> u64 {
    let mut next = [0; 8];
    let rest = bytes.get(at / 8..).unwrap_or_default();
    let taken = rest.len().min(8);
    next[..taken].copy_from_slice(&rest[..taken]);
    u64::from_le_bytes(next) >> (at % 8)
}

/// Bits on their way to bytes.
#[derive(Debug, Default)]
struct Bits {
    pending: u64,
    used: u32,
}

impl Bits {
    fn put(&mut self, bytes: &mut Vec<u8>, value: u64, count: u32) {
        self.pending |= value << self.used;
        self.used += count;
        while self.used >= 8 {
            bytes.push(self.pending as u8);
            self.pending >>= 8;
            self.used -= 8;
        }
    }
}
