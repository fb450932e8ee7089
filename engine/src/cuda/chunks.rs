//! [`Chunks`]: how decode attention cuts a row's keys between blocks: by their index alone, so that a row's bits depend on its own keys
//! alone.
//!
//! A chunk's partial result must be written and read again, so chunks should be large; one context has to keep all multiprocessors
//! busy, so they should be many. Therefore they grow along the keys: a short context is cut finely, a long one mostly coarsely.

use std::ops::Range;

use crate::backend::AttentionShape;

/// Keys per chunk, smallest first; those that follow are as large as [`Chunks::largest`]. And chunks of each size, of the smallest one where
/// there are KV heads enough. Mirrored in prelude.cuh.
const GROWING: [(usize, usize); 3] = [(256, 8), (320, 16), (512, 20)];

/// A way to cut keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunks {
    /// Chunks of the smallest size.
    smallest: usize,
    /// Keys of the chunks far behind.
    largest: usize,
}

impl Chunks {
    /// Sizes of chunks.
    pub(super) const SIZES: usize = GROWING.len() + 1;

    /// For a model, or a rank's part of one. With wide groups the partial results of a chunk are larger, so the chunk is, too. Few KV heads
    /// must be cut finely for one context to keep a GPU busy: half a multiprocessor's share of 32,768 keys of four heads is 500 keys.
    pub(super) fn of(shape: &AttentionShape) -> Self {
        let wide = shape.num_heads / shape.num_kv_heads > 2;
        let few = shape.num_kv_heads <= 4;
        Self {
            smallest: if few { 28 } else { GROWING[0].1 },
            largest: if wide && !few { 1024 } else { 512 },
        }
    }

    /// Chunks of at most `keys`, a multiple of 64; for tuning.
    pub(super) fn up_to(keys: usize) -> Self {
        Self {
            smallest: GROWING[0].1,
            largest: keys.max(1).next_multiple_of(64),
        }
    }

    /// How many have the smallest size.
    pub(super) fn smallest(self) -> usize {
        self.smallest
    }

    /// Keys of the largest.
    pub(super) fn largest(self) -> usize {
        self.largest
    }

    /// Keys of each size but the largest, and how many chunks have it.
    fn growing(self) -> [(usize, usize); GROWING.len()] {
        let mut growing = GROWING.map(|(keys, count)| (keys.min(self.largest), count));
        growing[0].1 = self.smallest;
        growing
    }

    /// Numbers of the chunks of so many keys that have the `size`-th size, smallest first.
    pub(super) fn of_size(self, size: usize, keys: usize) -> Range<usize> {
        let growing = self.growing();
        let (mut chunk, mut key) = (0, 0);
        for (each, count) in &growing[..size] {
            chunk += count;
            key += each * count;
        }
        let rest = keys.saturating_sub(key);
        match growing.get(size) {
            Some(&(each, count)) => chunk..chunk + rest.div_ceil(each).min(count),
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
        let few = AttentionShape {
            num_heads: 16,
            num_kv_heads: 4,
            head_dim: 128,
        };
        let up_to = [1024, 512, 64].map(Chunks::up_to);
        for chunks in [up_to[0], up_to[1], up_to[2], Chunks::of(&few)] {
            for keys in [0, 1, 255, 256, 257, 2049, 7168, 16_384, 16_385, 100_000] {
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
        assert_eq!(chunks.count(2048), 8);
        assert_eq!(chunks.count(2048 + 321), 10);
        assert_eq!(chunks.count(7168 + 20 * 512), 44);
        assert_eq!(chunks.count(7168 + 20 * 512 + 1025), 46);
        assert_eq!(chunks.of_size(3, 4096), 44..44);
    }
}
