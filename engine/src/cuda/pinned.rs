//! [`PinnedMemory`]: host memory that the device copies to and from by itself.
//!
//! Copies from ordinary memory go through a buffer of the driver's, a page at a time and with the caller waiting; logits are
//! megabytes per forward.

use std::sync::Arc;

use cudarc::driver::{CudaContext, DeviceRepr};

use super::error::CudaError;

/// Page-locked bytes that grow and are never given back between forwards. One user at a time: a copy that is under way must end
/// before the next begins.
pub(super) struct PinnedMemory {
    context: Arc<CudaContext>,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is to memory that this value owns alone.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// No bytes yet.
    pub(super) fn new(context: &Arc<CudaContext>) -> Self {
        Self {
            context: Arc::clone(context),
            start: std::ptr::null_mut(),
            bytes: 0,
        }
    }

    /// `len` elements, of unspecified value.
    pub(super) fn elements<T: DeviceRepr + Copy>(
        &mut self,
        len: usize,
    ) -> Result<&mut [T], CudaError> {
        let bytes = len * size_of::<T>();
        if bytes > self.bytes {
            self.release();
            let bytes = bytes.next_power_of_two();
            let take = || {
                self.context.bind_to_thread()?;
                // SAFETY: the memory is freed by `release` alone.
                let start = unsafe { cudarc::driver::result::malloc_host(bytes, 0) }?;
                // SAFETY: fresh memory of that size; zeros make every byte of it a value.
                unsafe { start.cast::<u8>().write_bytes(0, bytes) };
                Ok(start)
            };
            let start = take().map_err(CudaError::driver("taking pinned memory"))?;
            (self.start, self.bytes) = (start.cast(), bytes);
        }
        if len == 0 {
            return Ok(&mut []);
        }
        // SAFETY: the range is inside the memory, which is page-aligned and holds bytes that were written; numbers that cross
        // to the device take any bit pattern. The borrow of self makes it the only view.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.start.cast(), len) })
    }

    fn release(&mut self) {
        if !self.start.is_null() {
            // SAFETY: it came from `malloc_host`, and no view of it is left. A failure at the end of the process helps nobody.
            let _ = unsafe { cudarc::driver::result::free_host(self.start.cast()) };
            (self.start, self.bytes) = (std::ptr::null_mut(), 0);
        }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // Freeing needs the context on this thread, whichever that is.
        let _ = self.context.bind_to_thread();
        self.release();
    }
}
