//! [`Candidate`]: what a mask codec is to the measurement, and the list of those measured.
//!
//! A candidate that codes only a mask's contents is `Framed`: it pays for the same header, checksum and delta base as
//! the codec in the mask crate, so that sizes and times compare.

use anyhow::{Result, ensure};
use specattn_mask::{PositionSet, RoundMask};

use super::{history_classes, range_coder, rice_gaps, roaring_xor, zstd_xor};

/// Both ends of one session's masks.
pub trait Candidate {
    /// Encodes the session's next mask.
    fn encode(&mut self, mask: &RoundMask) -> Vec<u8>;

    /// Decodes the session's next mask.
    ///
    /// # Errors
    /// For bytes that do not decode.
    fn decode(&mut self, bytes: &[u8]) -> Result<RoundMask>;
}

/// A name for the table, and what opens a session.
pub type Entry = (&'static str, fn() -> Box<dyn Candidate>);

/// Every candidate, the mask crate's codec last.
pub fn candidates() -> Vec<Entry> {
    vec![
        ("bitmap of the XOR, zstd level 3", || {
            Box::new(Framed::new(zstd_xor::ZstdXor::default()))
        }),
        ("Roaring of the XOR", || {
            Box::new(Framed::new(roaring_xor::RoaringXor))
        }),
        ("Rice gaps of the XOR", || {
            Box::new(Framed::new(rice_gaps::RiceGaps))
        }),
        ("adaptive range coder", || {
            Box::new(Framed::new(range_coder::RangeCoder::default()))
        }),
        ("Rice gaps by history class (kept)", || {
            Box::new(history_classes::HistoryClasses::default())
        }),
    ]
}

/// A codec of bitmaps: one source's selection, given the previous one of the same source.
pub trait Contents {
    /// Codes `set`, given `previous` over the same positions, as source `source`.
    fn put(&mut self, source: usize, previous: &PositionSet, set: &PositionSet) -> Vec<u8>;

    /// The set coded in `bytes`, over `previous.len()` positions.
    ///
    /// # Errors
    /// For bytes that do not decode.
    fn take(&mut self, source: usize, previous: &PositionSet, bytes: &[u8]) -> Result<PositionSet>;
}

/// The positions in exactly one of two sets over the same positions.
pub fn xor(a: &PositionSet, b: &PositionSet) -> PositionSet {
    let words = a.words().iter().zip(b.words()).map(|(a, b)| a ^ b);
    PositionSet::from_words(a.len(), words.collect())
}

/// A codec of contents with the bytes that every mask on the wire needs: 2 of version and kind, 2 to name the base, 2 of
/// context growth, 2 of length, 4 of checksum. Only deltas at granularity 1 are coded.
struct Framed<C> {
    contents: C,
    /// The encoder's last mask, and the decoder's.
    sent: Vec<PositionSet>,
    received: Vec<PositionSet>,
}

/// Bytes before and after the contents.
const HEAD: usize = 8;
const CHECKSUM: usize = 4;

impl<C: Contents> Framed<C> {
    fn new(contents: C) -> Self {
        Self {
            contents,
            sent: Vec::new(),
            received: Vec::new(),
        }
    }
}

impl<C: Contents> Candidate for Framed<C> {
    fn encode(&mut self, mask: &RoundMask) -> Vec<u8> {
        self.sent.resize(mask.sources.len(), PositionSet::default());
        let last = self.sent.first().map_or(0, PositionSet::len);
        let mut bytes = vec![0; HEAD];
        bytes[4..6].copy_from_slice(&((mask.context_len - last) as u16).to_le_bytes());
        let count = mask.sources.len();
        for (source, (previous, set)) in self.sent.iter_mut().zip(&mask.sources).enumerate() {
            previous.resize(set.len());
            let coded = self.contents.put(source, previous, set);
            // The last source ends where the mask does; the others need their lengths.
            if source + 1 < count {
                bytes.extend((coded.len() as u16).to_le_bytes());
            }
            bytes.extend(coded);
            previous.clone_from(set);
        }
        bytes.extend(checksum(&mask.sources).to_le_bytes());
        bytes
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<RoundMask> {
        ensure!(bytes.len() >= HEAD + CHECKSUM, "truncated");
        self.received
            .resize(self.sent.len(), PositionSet::default());
        let last = self.received.first().map_or(0, PositionSet::len);
        let context_len = last + usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
        let (body, check) = bytes[HEAD..].split_at(bytes.len() - HEAD - CHECKSUM);
        let mut rest = body;
        let count = self.received.len();
        for (source, previous) in self.received.iter_mut().enumerate() {
            previous.resize(context_len);
            let mut coded = rest;
            if source + 1 < count {
                let (length, tail) = rest
                    .split_first_chunk()
                    .ok_or_else(|| anyhow::anyhow!("truncated"))?;
                let length = usize::from(u16::from_le_bytes(*length));
                ensure!(length <= tail.len(), "truncated");
                (coded, rest) = tail.split_at(length);
            }
            *previous = self.contents.take(source, previous, coded)?;
        }
        ensure!(
            check == checksum(&self.received).to_le_bytes(),
            "checksum mismatch"
        );
        Ok(RoundMask {
            context_len,
            granularity: 1,
            sources: self.received.clone(),
        })
    }
}

fn checksum(sources: &[PositionSet]) -> u32 {
    let words = sources.iter().flat_map(PositionSet::words);
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    crc32fast::hash(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_candidate_gives_masks_back() {
        // Some positions come and go while the context grows.
        let masks: Vec<RoundMask> = (0..12usize)
            .map(|round| {
                let context_len = 500 + 4 * round;
                let chosen = |source: usize| {
                    (0..context_len).filter(move |p| (p * 7 + source) % 13 < 2 + (p + round) % 3)
                };
                let sources = (0..3).map(|s| PositionSet::from_positions(context_len, chosen(s)));
                RoundMask {
                    context_len,
                    granularity: 1,
                    sources: sources.collect(),
                }
            })
            .collect();
        for (name, open) in candidates() {
            let mut codec = open();
            for mask in &masks {
                let coded = codec.encode(mask);
                assert_eq!(&codec.decode(&coded).unwrap(), mask, "{name}");
            }
        }
    }
}
