//! [`PeerEnd`]: sums over GPUs that reach each other's memory, as one kernel per rank.
//!
//! A decoding step sums a few kilobytes twice per layer, so a sum's time is that of its launch and of one way over the link. As a kernel
//! among the others it overlaps with them and is replayed with them as a graph, which a library's calls are not. Its order is rank
//! by rank, whatever the number of elements.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytemuck::{Pod, Zeroable};
use cudarc::driver::{result, sys};

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::memory::{DeviceMemory, not_taken};
use super::pinned::PinnedMemory;
use super::recording::LaunchShape;

/// Ranks that the kernel has room for.
const MOST_RANKS: usize = 8;
/// Pairs of numbers that a sum takes at most: 256 rows of 4,096.
const CAPACITY: usize = 1 << 19;
/// Bytes in which a pair crosses: each number with the number of its sum.
const PAIR_BYTES: usize = 16;
/// Numbers from which three ranks and more add up a slice each, which sends less and takes a second way over the link.
const SLICED_FROM: usize = 1 << 15;
/// Threads of a block, a pair each at a time.
const THREADS: u32 = 256;
/// Blocks per multiprocessor, all of which fit at a time by the kernel's launch bounds.
const BLOCKS: u32 = 4;

/// Mirrors `PeerSumArgs` in peer_sum.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PeerSumArgs {
    x: u64,
    inboxes: [u64; MOST_RANKS],
    state: u64,
    abandoned: u64,
    pairs: u32,
    capacity: u32,
    rank: u32,
    ranks: u32,
    slice: u32,
    unused: u32,
}

/// What the ranks have in common.
struct Shared {
    /// One per rank, on its device, written by the others.
    inboxes: Vec<Inbox>,
    abandoned: Abandoned,
}

/// One rank's end.
pub(super) struct PeerEnd {
    device: Arc<Device>,
    rank: usize,
    shared: Arc<Shared>,
    /// See the kernel: two numbers.
    state: DeviceMemory,
}

impl PeerEnd {
    /// Ends for these devices, in order; `None` where they do not reach each other's memory or are too many.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    pub(super) fn join(devices: &[Arc<Device>]) -> Result<Option<Vec<Self>>, CudaError> {
        if devices.len() > MOST_RANKS {
            return Ok(None);
        }
        for device in devices {
            for other in devices {
                if !open_memory(device, other)? {
                    return Ok(None);
                }
            }
        }
        let bytes = 2 * devices.len() * CAPACITY * PAIR_BYTES;
        let inboxes = devices.iter().map(|device| Inbox::new(device, bytes));
        let shared = Arc::new(Shared {
            inboxes: inboxes.collect::<Result<_, _>>()?,
            abandoned: Abandoned::new(devices[0].pinned())?,
        });
        let end = |(rank, device): (usize, &Arc<Device>)| {
            let kernel = Kernel::PEER_SUM;
            let options = Vec::new();
            device.prepare(&[Variant { kernel, options }])?;
            Ok(Self {
                device: Arc::clone(device),
                rank,
                shared: Arc::clone(&shared),
                state: DeviceMemory::zeroed(device, 8)?,
            })
        };
        devices
            .iter()
            .enumerate()
            .map(end)
            .collect::<Result<_, _>>()
            .map(Some)
    }

    /// Whether a sum of so many elements fits.
    pub(super) fn takes(&self, elements: usize) -> bool {
        elements.is_multiple_of(2) && elements / 2 <= CAPACITY
    }

    /// Replaces `elements` floats at `x` by their sum over the ranks, in the stream's order.
    ///
    /// # Errors
    /// [`CudaError::RankLeft`] or [`CudaError::Driver`].
    pub(super) fn sum(&self, x: u64, elements: usize) -> Result<(), CudaError> {
        assert!(self.takes(elements), "a sum that fits");
        if self.shared.abandoned.is_set() {
            return Err(CudaError::RankLeft);
        }
        if elements == 0 {
            return Ok(());
        }
        let (pairs, ranks) = ((elements / 2) as u32, self.shared.inboxes.len() as u32);
        let mut args = PeerSumArgs {
            x,
            inboxes: [0; MOST_RANKS],
            state: self.state.address(),
            abandoned: self.shared.abandoned.address(),
            pairs,
            capacity: CAPACITY as u32,
            rank: self.rank as u32,
            ranks,
            slice: if ranks > 2 && elements >= SLICED_FROM {
                pairs.div_ceil(ranks)
            } else {
                0
            },
            unused: 0,
        };
        for (address, inbox) in args.inboxes.iter_mut().zip(&self.shared.inboxes) {
            *address = inbox.address;
        }
        let blocks = pairs
            .div_ceil(THREADS)
            .min(BLOCKS * self.device.multiprocessors());
        let launch = LaunchShape {
            grid: (blocks, 1, 1),
            threads: THREADS,
            shared_bytes: 0,
        };
        let kernel = self.device.kernel(Kernel::PEER_SUM, &[])?;
        // SAFETY: x holds the elements; inboxes, state and the word on the host live as long as this end, and every pass is
        // waited for before its end can be dropped.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&args);
            })
        }
    }

    /// Lets the others go: their sums, those under way included, end with numbers that mean nothing.
    pub(super) fn leave(&self) {
        self.shared.abandoned.set();
    }
}

/// Lets kernels of `device` use memory of `other`; false where it cannot be.
fn open_memory(device: &Device, other: &Device) -> Result<bool, CudaError> {
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
struct Inbox {
    device: Arc<Device>,
    address: u64,
}

impl Inbox {
    /// `bytes` zeros.
    fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let take = || {
            device.stream().context().bind_to_thread()?;
            // SAFETY: `drop` alone gives it back.
            let address = unsafe { result::malloc_sync(bytes) }?;
            let inbox = Self {
                device: Arc::clone(device),
                address,
            };
            // SAFETY: memory of that size.
            unsafe { result::memset_d8_sync(address, 0, bytes) }?;
            Ok(inbox)
        };
        take().map_err(not_taken(device, bytes))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let _ = self.device.stream().context().bind_to_thread();
        // SAFETY: it came from `malloc_sync`, and the ends that use it are gone. A failure at the end of the process helps nobody.
        let _ = unsafe { result::free_sync(self.address) };
    }
}

/// A word of host memory that says whether a rank has gone; kernels that wait read it now and then.
struct Abandoned {
    /// Keeps the word.
    _memory: PinnedMemory,
    word: *const AtomicU32,
}

// SAFETY: the word is atomic, and lies in memory that lives as long as this value and that nobody else looks at.
unsafe impl Send for Abandoned {}
// SAFETY: as above.
unsafe impl Sync for Abandoned {}

impl Abandoned {
    fn new(mut memory: PinnedMemory) -> Result<Self, CudaError> {
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

    fn is_set(&self) -> bool {
        self.word().load(Ordering::Relaxed) != 0
    }

    fn set(&self) {
        self.word().store(1, Ordering::Relaxed);
    }

    /// Where all devices find it: they and the host share addresses.
    fn address(&self) -> u64 {
        self.word as u64
    }
}
