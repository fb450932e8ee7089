//! [`Chunks`]: how decode attention cuts a row's keys between blocks: by their index alone, so that a row's bits depend on its own keys
//! alone.
//!
//! A chunk's partial result must be written and read again, so chunks should be large; one context has to keep all multiprocessors
//! busy, so they should be many. Therefore they grow along the keys: a short context is cut finely, a long one mostly coarsely.

use std::ops::Range;

use crate::backend::AttentionShape;

/// Keys per chunk and chunks of each size, smallest first; all others are as large as [`Chunks::largest`]. Mirrored in
/// prelude.cuh.
const GROWING: [(usize, usize); 2] = [(256, 16), (512, 24)];

/// A way to cut keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunks {
    /// Keys of the chunks far behind.
    largest: usize,
}

impl Chunks {
    /// Sizes of chunks.
    pub(super) const SIZES: usize = GROWING.len() + 1;

    /// For a model: with wide groups the partial results of a chunk are larger, so the chunk is, too.
    pub(super) fn of(shape: &AttentionShape) -> Self {
        let wide = shape.num_heads / shape.num_kv_heads > 2;
        Self {
            largest: if wide { 1024 } else { 512 },
        }
    }

    /// Chunks of at most `keys`, a multiple of 64; for tuning.
    pub(super) fn up_to(keys: usize) -> Self {
        Self {
            largest: keys.max(1).next_multiple_of(64),
        }
    }

    /// Keys of the largest.
    pub(super) fn largest(self) -> usize {
        self.largest
    }

    /// Numbers of the chunks of so many keys that have the `size`-th size, smallest first.
    pub(super) fn of_size(self, size: usize, keys: usize) -> Range<usize> {
        let (mut chunk, mut key) = (0, 0);
        for &(each, count) in &GROWING[..size] {
            chunk += count;
            key += each.min(self.largest) * count;
        }
        let rest = keys.saturating_sub(key);
        match GROWING.get(size) {
            Some(&(each, count)) => chunk..chunk + rest.div_ceil(each.min(self.largest)).min(count),
            None => chunk..chunk + rest.div_ceil(self.largest),
        }
    }

    /// Chunks of so many keys.
    pub(super) fn count(self, keys: usize) -> usize {
        (0..Self::SIZES)
            .map(|size| self.of_size(size, keys).len())
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_follow_each_other_and_cover_all_keys() {
        for chunks in [Chunks::up_to(1024), Chunks::up_to(512), Chunks::up_to(64)] {
            for keys in [0, 1, 255, 256, 257, 4096, 4097, 16_384, 16_385, 100_000] {
                let numbers: Vec<usize> = (0..Chunks::SIZES)
                    .flat_map(|size| chunks.of_size(size, keys))
                    .collect();
                assert!(numbers.iter().copied().eq(0..chunks.count(keys)), "{keys}");
            }
        }
    }

    #[test]
    fn chunks_grow() {
        let chunks = Chunks::up_to(1024);
        assert_eq!(chunks.count(4096), 16);
        assert_eq!(chunks.count(4097), 17);
        assert_eq!(chunks.count(16_384), 40);
        assert_eq!(chunks.count(16_384 + 1025), 42);
        assert_eq!(chunks.of_size(2, 4096), 40..40);
    }
}
