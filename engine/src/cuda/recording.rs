//! [`Recording`]: launches written down: which kernel, how many blocks, which arguments.
//!
//! Arguments are kept by value, as the words that a kernel gets. Two recordings are equal exactly when they ask for the same work on
//! the same memory.

use std::ffi::c_void;
use std::ops::Range;

use bytemuck::NoUninit;
use cudarc::driver::{DriverError, sys};

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LaunchShape {
    /// Blocks.
    pub(super) grid: (u32, u32, u32),
    /// Threads per block.
    pub(super) threads: u32,
    /// Dynamic shared memory per block.
    pub(super) shared_bytes: u32,
}

/// One launch, whose arguments and their words follow those of the launch before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launch {
    function: sys::CUfunction,
    shape: LaunchShape,
    arguments_end: usize,
    words_end: usize,
}

/// Launches, in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Recording {
    launches: Vec<Launch>,
    /// The first word of each argument.
    arguments: Vec<usize>,
    words: Vec<u64>,
}

/// What a kernel is called with: values, in the order of its parameters.
pub(super) struct Arguments<'a>(&'a mut Recording);

impl Arguments<'_> {
    /// Adds a value. It has no padding bytes, which would make equal arguments differ.
    pub(super) fn arg<T: NoUninit>(&mut self, value: &T) -> &mut Self {
        let Recording {
            arguments, words, ..
        } = &mut *self.0;
        let (first, bytes) = (words.len(), bytemuck::bytes_of(value));
        arguments.push(first);
        words.resize(first + bytes.len().div_ceil(8), 0);
        bytemuck::cast_slice_mut::<u64, u8>(&mut words[first..])[..bytes.len()]
            .copy_from_slice(bytes);
        self
    }
}

impl Recording {
    /// Launches.
    pub(super) fn len(&self) -> usize {
        self.launches.len()
    }

    /// Forgets them and keeps their memory.
    pub(super) fn clear(&mut self) {
        self.launches.clear();
        self.arguments.clear();
        self.words.clear();
    }

    /// Writes down a launch with the arguments that `push` adds.
    pub(super) fn write(
        &mut self,
        function: sys::CUfunction,
        shape: LaunchShape,
        push: impl FnOnce(&mut Arguments<'_>),
    ) {
        push(&mut Arguments(self));
        self.launches.push(Launch {
            function,
            shape,
            arguments_end: self.arguments.len(),
            words_end: self.words.len(),
        });
    }

    /// Where the arguments of launch `number`, and their words, are.
    fn arguments_of(&self, number: usize) -> (Range<usize>, Range<usize>) {
        let (arguments, words) = match number.checked_sub(1) {
            None => (0, 0),
            Some(before) => {
                let before = &self.launches[before];
                (before.arguments_end, before.words_end)
            }
        };
        let own = &self.launches[number];
        (arguments..own.arguments_end, words..own.words_end)
    }

    /// Whether both have launch `number`, and it is the same, those before it being the same.
    pub(super) fn same_launch(&self, other: &Self, number: usize) -> bool {
        if number >= other.len() || self.launches.get(number) != Some(&other.launches[number]) {
            return false;
        }
        let (arguments, words) = self.arguments_of(number);
        self.arguments[arguments.clone()] == other.arguments[arguments]
            && self.words[words.clone()] == other.words[words]
    }

    /// Whether it begins with all launches of `other`.
    pub(super) fn begins_like(&self, other: &Self) -> bool {
        (0..other.len()).all(|number| self.same_launch(other, number))
    }

    /// Launches those from number `first` on, on `stream`. With `overlaps` each may start before the one ahead of it has ended.
    ///
    /// # Errors
    /// The driver's, on the first launch that it refuses.
    ///
    /// # Safety
    /// The stream and the kernels are live; each launch has its kernel's arguments, and every address in them is device memory of
    /// the size that the kernel touches.
    pub(super) unsafe fn issue(
        &self,
        first: usize,
        stream: sys::CUstream,
        overlaps: bool,
    ) -> Result<(), DriverError> {
        // SAFETY: zeros are a value of this plain C structure.
        let mut overlap: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        overlap.id =
            sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        overlap.value.programmaticStreamSerializationAllowed = 1;
        let mut values: Vec<*mut c_void> = Vec::new();
        for (number, launch) in self.launches.iter().enumerate().skip(first) {
            let (arguments, _) = self.arguments_of(number);
            let of_word = |&word: &usize| self.words[word..].as_ptr().cast_mut().cast();
            values.clear();
            values.extend(self.arguments[arguments].iter().map(of_word));
            let (x, y, z) = launch.shape.grid;
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: launch.shape.threads,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: launch.shape.shared_bytes,
                hStream: stream,
                attrs: &raw mut overlap,
                numAttrs: u32::from(overlaps),
            };
            // SAFETY: the caller's promise; the configuration and the values live until the call returns, which copies them.
            unsafe {
                sys::cuLaunchKernelEx(
                    &raw const config,
                    launch.function,
                    values.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
            .result()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(blocks: u32) -> LaunchShape {
        LaunchShape {
            grid: (blocks, 1, 1),
            threads: 32,
            shared_bytes: 0,
        }
    }

    /// A launch per pair of blocks and argument.
    fn recording(launches: &[(u32, u32)]) -> Recording {
        let mut recording = Recording::default();
        for &(blocks, value) in launches {
            recording.write(std::ptr::null_mut(), shape(blocks), |l| {
                l.arg(&value).arg(&7u64);
            });
        }
        recording
    }

    #[test]
    fn recordings_are_equal_by_what_they_ask_for() {
        assert_eq!(recording(&[(1, 2), (3, 4)]), recording(&[(1, 2), (3, 4)]));
        assert_ne!(recording(&[(1, 2), (3, 4)]), recording(&[(1, 2), (3, 5)]));
        assert_ne!(recording(&[(1, 2), (3, 4)]), recording(&[(1, 2), (4, 4)]));
        assert_ne!(recording(&[(1, 2), (3, 4)]), recording(&[(1, 2)]));
        // The same words as two arguments, and as one.
        let with = |push: fn(&mut Arguments<'_>)| {
            let mut recording = Recording::default();
            recording.write(std::ptr::null_mut(), shape(1), push);
            recording
        };
        let apart = with(|l| {
            l.arg(&1u64).arg(&2u64);
        });
        let together = with(|l| {
            l.arg(&[1u64, 2]);
        });
        assert_eq!(apart.words, together.words);
        assert_ne!(apart, together);
        assert!(!apart.begins_like(&together));
    }

    #[test]
    fn values_begin_on_eight_bytes() {
        let mut recording = Recording::default();
        recording.write(std::ptr::null_mut(), shape(1), |l| {
            l.arg(&1u32).arg(&[2u32, 3, 4]).arg(&5.0f32);
        });
        assert_eq!(recording.arguments, [0, 1, 3]);
        let bits = u64::from(5.0f32.to_bits());
        assert_eq!(recording.words, [1, 3 << 32 | 2, 4, bits]);
    }

    #[test]
    fn beginnings_are_told_from_ends() {
        let whole = recording(&[(1, 2), (3, 4), (5, 6)]);
        assert!(whole.begins_like(&recording(&[])));
        assert!(whole.begins_like(&recording(&[(1, 2), (3, 4)])));
        assert!(whole.begins_like(&whole));
        assert!(!whole.begins_like(&recording(&[(1, 2), (3, 5)])));
        assert!(!recording(&[(1, 2)]).begins_like(&whole));
        assert!(whole.same_launch(&recording(&[(1, 2), (3, 4)]), 1));
        assert!(!whole.same_launch(&recording(&[(1, 2), (3, 4)]), 2));
    }
}
