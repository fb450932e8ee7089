//! [`Staging`]: the way of weights from a mapped file to a device, through two pieces of pinned memory.
//!
//! While the device copies one piece, the next is filled from the file. Several threads fill it, since a mapped page's first touch
//! is mostly waiting. A copy from the mapping itself would go through a small buffer of the driver's, with both sides waiting
//! for each other.

use std::sync::Arc;

use cudarc::driver::CudaEvent;

use super::device::Device;
use super::error::CudaError;
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;

/// Bytes of a piece; a power of two.
const PIECE: usize = 32 << 20;
/// What is not worth a piece.
const SMALL: usize = 256 << 10;
/// Threads that fill a piece, and the least that one fills.
const READERS: usize = 4;
const SHARE: usize = 1 << 20;

/// Pinned memory for copies to one device, none at first.
pub(super) struct Staging {
    device: Arc<Device>,
    halves: [Half; 2],
    next: usize,
}

struct Half {
    memory: PinnedMemory,
    /// After the copy that reads it.
    copied: Option<CudaEvent>,
}

impl Half {
    fn new(device: &Device) -> Self {
        Self {
            memory: device.pinned(),
            copied: None,
        }
    }

    /// Waits until nobody reads it.
    fn wait(&mut self) -> Result<(), CudaError> {
        match self.copied.take() {
            None => Ok(()),
            Some(copied) => copied.synchronize().map_err(CudaError::driver(WAITING)),
        }
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        // A device that fails reads no more.
        let _ = self.wait();
    }
}

const WAITING: &str = "copying weights to the GPU";

impl Staging {
    /// Takes memory when it is first needed.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            halves: [Half::new(device), Half::new(device)],
            next: 0,
        }
    }

    /// Copies `bytes` to the beginning of `to`, in the stream's order. Nobody waits for the end.
    pub(super) fn copy(&mut self, bytes: &[u8], to: &mut DeviceMemory) -> Result<(), CudaError> {
        if bytes.len() < SMALL {
            return to.write(0, bytes);
        }
        for (number, piece) in bytes.chunks(PIECE).enumerate() {
            let half = &mut self.halves[self.next];
            self.next ^= 1;
            half.wait()?;
            let staged = half.memory.elements(piece.len())?;
            fill(staged, piece);
            to.write(number * PIECE, staged)?;
            let stream = self.device.stream();
            let copied = stream.record_event(None).inspect_err(|_| {
                // Without an event there is no other way to know that the copy has ended.
                let _ = stream.synchronize();
            });
            half.copied = Some(copied.map_err(CudaError::driver(WAITING))?);
        }
        Ok(())
    }

    /// Gives the pinned memory back.
    pub(super) fn release(&mut self) {
        self.halves = [Half::new(&self.device), Half::new(&self.device)];
    }
}

/// `to = from`, by several threads.
fn fill(to: &mut [u8], from: &[u8]) {
    let share = from.len().div_ceil(READERS).max(SHARE);
    std::thread::scope(|scope| {
        let mut parts = to.chunks_mut(share).zip(from.chunks(share));
        let first = parts.next();
        for (to, from) in parts {
            scope.spawn(move || to.copy_from_slice(from));
        }
        if let Some((to, from)) = first {
            to.copy_from_slice(from);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_filled_whole() {
        for len in [0, 1, SHARE - 1, SHARE, SHARE + 1, READERS * SHARE + 3] {
            let from: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let mut to = vec![0; len];
            fill(&mut to, &from);
            assert!(to == from, "{len} bytes");
        }
    }
}
