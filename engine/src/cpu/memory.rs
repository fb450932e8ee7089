//! Memory that vector code likes: aligned to cache lines, zeroed, touched only when used.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A cache line, and the alignment of every vector load.
const ALIGN: usize = 64;

/// Zeroed bytes aligned to 64. Large ones come from the system untouched, so unused pages cost nothing.
pub(crate) struct AlignedBytes {
    pointer: NonNull<u8>,
    len: usize,
}

// SAFETY: plain owned memory.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access is read-only; writers go through exclusive or disjoint access.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            let aligned = std::ptr::without_provenance_mut(ALIGN);
            return Self {
                pointer: NonNull::new(aligned).expect("ALIGN is not 0"),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not 0.
        let pointer = unsafe { alloc_zeroed(layout) };
        let Some(pointer) = NonNull::new(pointer) else {
            handle_alloc_error(layout)
        };
        Self { pointer, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, ALIGN).expect("fewer than isize::MAX bytes")
    }

    /// The first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated with the same layout.
            unsafe { dealloc(self.pointer.as_ptr(), Self::layout(self.len)) }
        }
    }
}

/// A growable, aligned f32 buffer whose contents are overwritten by every use.
pub(crate) struct Buffer {
    bytes: AlignedBytes,
    len: usize,
}

impl Buffer {
    /// An empty buffer.
    pub(crate) fn new() -> Self {
        Self {
            bytes: AlignedBytes::zeroed(0),
            len: 0,
        }
    }

    /// Makes room for `len` floats; the contents become unspecified (zeros or earlier values).
    pub(crate) fn resize(&mut self, len: usize) {
        if len * size_of::<f32>() > self.bytes.len() {
            self.bytes = AlignedBytes::zeroed(len.next_power_of_two() * size_of::<f32>());
        }
        self.len = len;
    }
}

impl std::ops::Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `len` floats fit by `resize`, and any bits are a float.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().cast(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `deref`, and access is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr().cast(), self.len) }
    }
}

thread_local! {
    static SPARE: std::cell::RefCell<Vec<Buffer>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Aligned scratch of the current thread: taken from a per-thread store, given back on drop, never freed between.
pub(crate) struct Scratch(Buffer);

impl Scratch {
    /// `len` floats of unspecified value.
    pub(crate) fn take(len: usize) -> Self {
        let mut buffer = SPARE.with_borrow_mut(Vec::pop).unwrap_or_else(Buffer::new);
        buffer.resize(len);
        Self(buffer)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::replace(&mut self.0, Buffer::new());
        SPARE.with_borrow_mut(|spare| spare.push(buffer));
    }
}

impl std::ops::Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl std::ops::DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}
