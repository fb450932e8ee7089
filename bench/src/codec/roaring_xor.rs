//! The changed positions as a serialised Roaring bitmap.

use anyhow::Result;
use roaring::RoaringBitmap;
use specattn_mask::PositionSet;

use super::candidate::{Contents, xor};

/// Arrays of 16-bit positions or bitmaps, whichever the library picks.
#[derive(Debug)]
pub struct RoaringXor;

impl Contents for RoaringXor {
    fn put(&mut self, _source: usize, previous: &PositionSet, set: &PositionSet) -> Vec<u8> {
        let mut bitmap =
            RoaringBitmap::from_sorted_iter(xor(previous, set).iter().map(|p| p as u32))
                .expect("a set gives its members in increasing order");
        bitmap.optimize();
        let mut bytes = Vec::with_capacity(bitmap.serialized_size());
        bitmap
            .serialize_into(&mut bytes)
            .expect("writing to memory does not fail");
        bytes
    }

    fn take(
        &mut self,
        _source: usize,
        previous: &PositionSet,
        bytes: &[u8],
    ) -> Result<PositionSet> {
        let bitmap = RoaringBitmap::deserialize_from(bytes)?;
        let mut set = previous.clone();
        for position in bitmap {
            set.toggle(position as usize);
        }
        Ok(set)
    }
}
