//! The bitmap of changed positions, compressed by zstd.

use anyhow::Result;
use specattn_mask::PositionSet;
use zstd::bulk::{Compressor, Decompressor};

use super::candidate::{Contents, xor};

/// The frame's four magic bytes, always the same, are left away.
const MAGIC: [u8; 4] = zstd::zstd_safe::MAGICNUMBER.to_le_bytes();

/// Level 3, zstd's default; higher ones win less than 1 % here. Contexts are kept between masks.
pub struct ZstdXor {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

impl Default for ZstdXor {
    fn default() -> Self {
        let mut compressor = Compressor::new(3).expect("level 3 exists");
        // The length is known and the mask carries its own checksum.
        compressor
            .include_contentsize(false)
            .expect("the parameter exists");
        compressor
            .include_checksum(false)
            .expect("the parameter exists");
        let decompressor = Decompressor::new().expect("a decompression context is small");
        Self {
            compressor,
            decompressor,
        }
    }
}

impl Contents for ZstdXor {
    fn put(&mut self, _source: usize, previous: &PositionSet, set: &PositionSet) -> Vec<u8> {
        let changed = xor(previous, set);
        let bytes: Vec<u8> = changed
            .words()
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        let mut frame = self
            .compressor
            .compress(&bytes)
            .expect("the output buffer holds any input's worst case");
        frame.split_off(MAGIC.len())
    }

    fn take(
        &mut self,
        _source: usize,
        previous: &PositionSet,
        bytes: &[u8],
    ) -> Result<PositionSet> {
        let bytes = self
            .decompressor
            .decompress(&[&MAGIC, bytes].concat(), 8 * previous.words().len())?;
        let words = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|chunk| u64::from_le_bytes(*chunk));
        Ok(xor(
            previous,
            &PositionSet::from_words(previous.len(), words.collect()),
        ))
    }
}
