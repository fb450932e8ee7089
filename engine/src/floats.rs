//! [`Floats`]: a vector whose memory is used again.
//!
//! A row of a large vocabulary is half a megabyte, and a batch makes dozens of them per forward. Freed memory of that size goes back to the
//! system, and the first touch of each fresh page takes longer than to fill it.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Numbers below which memory is not worth keeping: the allocator keeps it itself.
const FEWEST: usize = 1 << 14;
/// Numbers that memory at rest may have room for: a quarter of a gibibyte.
const MOST_AT_REST: usize = 1 << 26;

/// Memory of vectors that were dropped.
static AT_REST: Mutex<AtRest> = Mutex::new(AtRest {
    vectors: Vec::new(),
    numbers: 0,
});

#[derive(Default)]
struct AtRest {
    /// The one dropped last comes last.
    vectors: Vec<Vec<f32>>,
    /// Room in all of them.
    numbers: usize,
}

impl AtRest {
    /// One with room for `len` numbers and not for many more.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        let fits = |vector: &Vec<f32>| (len..=2 * len).contains(&vector.capacity());
        let found = self.vectors.iter().rposition(fits)?;
        let vector = self.vectors.remove(found);
        self.numbers -= vector.capacity();
        Some(vector)
    }

    /// Those that nobody has asked for the longest make room.
    fn put(&mut self, vector: Vec<f32>) {
        self.numbers += vector.capacity();
        self.vectors.push(vector);
        let mut too_many = 0;
        for vector in &self.vectors {
            if self.numbers <= MOST_AT_REST {
                break;
            }
            self.numbers -= vector.capacity();
            too_many += 1;
        }
        self.vectors.drain(..too_many);
    }
}

/// Numbers, in memory that others had before and will have after.
#[derive(Debug, Default, PartialEq)]
pub struct Floats(Vec<f32>);

impl Floats {
    /// `len` numbers of unspecified value.
    pub(crate) fn of_len(len: usize) -> Self {
        let mut vector = if len < FEWEST {
            Vec::new()
        } else {
            let mut at_rest = AT_REST.lock().unwrap_or_else(PoisonError::into_inner);
            at_rest.take(len).unwrap_or_default()
        };
        // Numbers that are there stay as they are.
        vector.resize(len, 0.0);
        Self(vector)
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        if self.0.capacity() >= FEWEST {
            let vector = std::mem::take(&mut self.0);
            let mut at_rest = AT_REST.lock().unwrap_or_else(PoisonError::into_inner);
            at_rest.put(vector);
        }
    }
}

impl Clone for Floats {
    fn clone(&self) -> Self {
        let mut copy = Self::of_len(self.len());
        copy.copy_from_slice(self);
        copy
    }
}

impl From<Vec<f32>> for Floats {
    fn from(values: Vec<f32>) -> Self {
        Self(values)
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_at_rest_is_taken_where_it_fits_and_never_grows_without_bound() {
        let mut at_rest = AtRest::default();
        at_rest.put(Vec::with_capacity(3 * FEWEST));
        assert!(at_rest.take(FEWEST).is_none() && at_rest.take(4 * FEWEST).is_none());
        assert_eq!(at_rest.take(2 * FEWEST).unwrap().capacity(), 3 * FEWEST);
        assert_eq!((at_rest.numbers, at_rest.vectors.len()), (0, 0));
        at_rest.put(Vec::with_capacity(FEWEST));
        for _ in 0..2 * MOST_AT_REST / (1 << 20) {
            at_rest.put(Vec::with_capacity(1 << 20));
        }
        assert_eq!(at_rest.numbers, MOST_AT_REST);
        assert!(at_rest.take(FEWEST).is_none());
        at_rest.put(Vec::with_capacity(MOST_AT_REST + 1));
        assert_eq!((at_rest.numbers, at_rest.vectors.len()), (0, 0));
    }

    #[test]
    fn numbers_are_as_many_as_asked_for() {
        for len in [0, 1, FEWEST, 2 * FEWEST, FEWEST + 7] {
            let mut floats = Floats::of_len(len);
            assert_eq!(floats.len(), len);
            floats.fill(1.0);
            assert_eq!(floats.clone(), floats);
        }
    }
}
