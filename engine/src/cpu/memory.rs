//! Memory that vector code likes: aligned to cache lines, zeroed, touched only when used.

use memmap2::MmapMut;

/// Zeroed bytes straight from the system: aligned to pages, untouched pages cost nothing, and large ranges sit on huge
/// pages where the system has them (a KV cache of 4 KiB pages misses the translation buffer at every other entry).
pub(crate) struct AlignedBytes {
    map: Option<MmapMut>,
    pointer: *mut u8,
    len: usize,
}

// SAFETY: plain owned memory.
unsafe impl Send for AlignedBytes {}
// SAFETY: shared access is read-only; writers go through exclusive or disjoint access.
unsafe impl Sync for AlignedBytes {}

/// Alignment of empty ranges; others have a page's.
const ALIGN: usize = 64;

impl AlignedBytes {
    /// `len` zero bytes.
    ///
    /// # Panics
    /// When the system refuses the address space, as an allocator would.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                map: None,
                pointer: std::ptr::without_provenance_mut(ALIGN),
                len,
            };
        }
        let mut map = MmapMut::map_anon(len).expect("the system grants memory");
        // A hint: without it the memory is merely slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let pointer = map.as_mut_ptr();
        Self {
            map: Some(map),
            pointer,
            len,
        }
    }

    /// The first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.pointer
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.map.as_ref().map_or(0, |_| self.len)
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
