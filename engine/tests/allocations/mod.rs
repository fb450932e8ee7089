//! A global allocator that notes the largest single request, so that a test can tell a bounded failure from one that
//! believed a length it read.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Per thread: tests run side by side, and each judges its own requests.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

/// Forgets what this thread has asked for so far.
pub(crate) fn reset_largest() {
    LARGEST.set(0);
}

/// The largest number of bytes this thread asked for at once since [`reset_largest`].
pub(crate) fn largest() -> usize {
    LARGEST.get()
}

struct Noting;

fn note(bytes: usize) {
    // A thread that is ending has no locals left; its last allocations are not of interest.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call is handed on to the system allocator unchanged; noting a number allocates nothing.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are the system allocator's own.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        note(new_size);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, new_size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;
