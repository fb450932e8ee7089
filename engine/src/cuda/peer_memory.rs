//! Memory that several GPUs reach: [`PeerMemory`], and [`Abandoned`], by which ranks that wait for each other there are let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cudarc::driver::{result, sys};

use super::device::Device;
use super::error::CudaError;
use super::memory::not_taken;
use super::pinned::PinnedMemory;

/// Lets kernels of each of these devices use memory of the others; false where it cannot be.
///
/// # Errors
/// [`CudaError::Driver`].
pub(super) fn open_memory(devices: &[Arc<Device>]) -> Result<bool, CudaError> {
    for device in devices {
        for other in devices {
            if !open_to(device, other)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Lets kernels of `device` use memory of `other`; false where it cannot be.
fn open_to(device: &Device, other: &Device) -> Result<bool, CudaError> {
    let (own, peer) = (device.stream().context(), other.stream().context());
    let open = || {
        if device.ordinal() == other.ordinal() {
            return Ok(true);
        }
        let mut can = 0;
        // SAFETY: both devices are open, and there is a place for the answer.
        unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, own.cu_device(), peer.cu_device()) }
            .result()?;
        if can == 0 {
            return Ok(false);
        }
        own.bind_to_thread()?;
        // SAFETY: the peer's context lives as long as its device.
        match unsafe { sys::cuCtxEnablePeerAccess(peer.cu_ctx(), 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(true),
            result => result.result().map(|()| true),
        }
    };
    open().map_err(CudaError::driver("opening a GPU's memory to another"))
}

/// Memory of one device that its peers write to. Such memory does not come from a stream's pool, which peers do not see.
pub(super) struct PeerMemory {
    device: Arc<Device>,
    address: u64,
}

impl PeerMemory {
    /// So many bytes of that value.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    pub(super) fn new(device: &Arc<Device>, bytes: usize, value: u8) -> Result<Self, CudaError> {
        let take = || {
            device.stream().context().bind_to_thread()?;
            // SAFETY: `drop` alone gives it back.
            let address = unsafe { result::malloc_sync(bytes) }?;
            let memory = Self {
                device: Arc::clone(device),
                address,
            };
            // SAFETY: memory of that size.
            unsafe { result::memset_d8_sync(address, value, bytes) }?;
            Ok(memory)
        };
        take().map_err(not_taken(device, bytes))
    }

    /// Where it begins, for all devices.
    pub(super) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for PeerMemory {
    fn drop(&mut self) {
        let _ = self.device.stream().context().bind_to_thread();
        // SAFETY: it came from `malloc_sync`, and the ends that use it are gone. A failure at the end of the process helps nobody.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// A word of host memory that says whether a rank has gone; kernels that wait read it now and then.
pub(super) struct Abandoned {
    /// Keeps the word.
    _memory: PinnedMemory,
    word: *const AtomicU32,
}

// SAFETY: the word is atomic, and lies in memory that lives as long as this value and that nobody else looks at.
unsafe impl Send for Abandoned {}
// SAFETY: as above.
unsafe impl Sync for Abandoned {}

impl Abandoned {
    /// The word, in this memory.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub(super) fn new(mut memory: PinnedMemory) -> Result<Self, CudaError> {
        let word = memory.elements::<u32>(1)?.as_mut_ptr().cast_const().cast();
        Ok(Self {
            _memory: memory,
            word,
        })
    }

    fn word(&self) -> &AtomicU32 {
        // SAFETY: pinned memory is page-aligned, zeroed when taken, and kept with the pointer.
        unsafe { &*self.word }
    }

    /// Fails once a rank has gone.
    ///
    /// # Errors
    /// [`CudaError::RankLeft`].
    pub(super) fn check(&self) -> Result<(), CudaError> {
        if self.word().load(Ordering::Relaxed) != 0 {
            return Err(CudaError::RankLeft);
        }
        Ok(())
    }

    /// Lets the ranks that wait go: their sums, those under way included, end with numbers that mean nothing.
    pub(super) fn set(&self) {
        self.word().store(1, Ordering::Relaxed);
    }

    /// Where all devices find it: they and the host share addresses.
    pub(super) fn address(&self) -> u64 {
        self.word as u64
    }
}
