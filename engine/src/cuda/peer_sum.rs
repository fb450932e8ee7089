//! [`PeerEnd`]: sums over GPUs that reach each other's memory, as one kernel per rank.
//!
//! A decoding step sums a few kilobytes twice per layer, so a sum's time is that of its launch and of one way over the link. As a kernel
//! among the others it overlaps with them and is replayed with them as a graph, which a library's calls are not. Its order is rank
//! by rank, whatever the number of elements.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::memory::DeviceMemory;
use super::peer_memory::{Abandoned, PeerMemory};
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

/// One rank's end.
pub(super) struct PeerEnd {
    device: Arc<Device>,
    rank: usize,
    /// One per rank, on its device, written by the others.
    inboxes: Arc<Vec<PeerMemory>>,
    abandoned: Arc<Abandoned>,
    /// See the kernel: two numbers.
    state: DeviceMemory,
}

impl PeerEnd {
    /// Ends for these devices, which reach each other's memory, in order; `None` where they are too many.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    pub(super) fn join(
        devices: &[Arc<Device>],
        abandoned: &Arc<Abandoned>,
    ) -> Result<Option<Vec<Self>>, CudaError> {
        if devices.len() > MOST_RANKS {
            return Ok(None);
        }
        let bytes = 2 * devices.len() * CAPACITY * PAIR_BYTES;
        let inboxes = devices.iter().map(|d| PeerMemory::new(d, bytes, 0));
        let inboxes = Arc::new(inboxes.collect::<Result<Vec<_>, _>>()?);
        let end = |(rank, device): (usize, &Arc<Device>)| {
            let kernel = Kernel::PEER_SUM;
            let options = Vec::new();
            device.prepare(&[Variant { kernel, options }])?;
            Ok(Self {
                device: Arc::clone(device),
                rank,
                inboxes: Arc::clone(&inboxes),
                abandoned: Arc::clone(abandoned),
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
        self.abandoned.check()?;
        if elements == 0 {
            return Ok(());
        }
        let (pairs, ranks) = ((elements / 2) as u32, self.inboxes.len() as u32);
        let mut args = PeerSumArgs {
            x,
            inboxes: [0; MOST_RANKS],
            state: self.state.address(),
            abandoned: self.abandoned.address(),
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
        for (address, inbox) in args.inboxes.iter_mut().zip(self.inboxes.iter()) {
            *address = inbox.address();
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
}
