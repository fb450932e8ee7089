//! [`NormEnd`]: a product's sum over two GPUs that reach each other's memory, and its norm.
//!
//! The product sends its results to both ranks as it has them ([`Sending`]), and one kernel of each receives, adds up and norms: a kernel
//! less than product, sum and norm, and the way over the link begins before the product has ended. Over more ranks it was
//! no faster: a row's block then reads the parts of all of them.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::device::Device;
use super::elementwise::blocks;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::memory::DeviceMemory;
use super::peer_memory::{Abandoned, PeerMemory};

/// Numbers that a sum takes at most: 256 rows of 4,096.
const CAPACITY: usize = 1 << 20;
/// A byte of `NOT_SENT` in prelude.cuh.
const NOT_SENT: u8 = 0xff;

/// Where a product goes that is a part of a sum; mirrors `Sending` in prelude.cuh. By default the product is none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
pub(super) struct Sending {
    own: u64,
    other: u64,
    turn: u64,
    half: u32,
    unused: u32,
}

/// Mirrors `PeerNormArgs` in peer_norm.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PeerNormArgs {
    x: u64,
    weight: u64,
    out: u64,
    parts: [u64; 2],
    state: u64,
    abandoned: u64,
    half: u32,
    width: u32,
    rank: u32,
    eps: f32,
    rows_by_lane: u32,
    padding: u32,
}

/// One rank's end.
pub(super) struct NormEnd {
    device: Arc<Device>,
    rank: usize,
    /// Of the kernel.
    options: [(&'static str, u32); 1],
    /// By rank that has the memory: both ranks' parts of two sums, `[ranks, 2, CAPACITY]` floats.
    parts: Arc<[PeerMemory; 2]>,
    abandoned: Arc<Abandoned>,
    /// See the kernel: two numbers.
    state: DeviceMemory,
}

impl NormEnd {
    /// Ends for two devices, which reach each other's memory, in order; norms are f16 or bf16.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] or [`CudaError::Driver`].
    pub(super) fn join(
        devices: [&Arc<Device>; 2],
        half_is_f16: bool,
        abandoned: &Arc<Abandoned>,
    ) -> Result<[Self; 2], CudaError> {
        let memory = |device| PeerMemory::new(device, 2 * 2 * CAPACITY * 4, NOT_SENT);
        let parts = Arc::new([memory(devices[0])?, memory(devices[1])?]);
        let options = [("HALF_IS_F16", u32::from(half_is_f16))];
        let end = |rank: usize| {
            let device = Arc::clone(devices[rank]);
            device.prepare(&[Variant {
                kernel: Kernel::PEER_NORM,
                options: options.to_vec(),
            }])?;
            Ok(Self {
                rank,
                options,
                parts: Arc::clone(&parts),
                abandoned: Arc::clone(abandoned),
                state: DeviceMemory::zeroed(&device, 8)?,
                device,
            })
        };
        Ok([end(0)?, end(1)?])
    }

    /// Whether a sum of so many elements fits.
    pub(super) fn takes(&self, elements: usize) -> bool {
        elements <= CAPACITY
    }

    /// Where `rank`'s parts are in the memory of `owner`.
    fn parts_of(&self, rank: usize, owner: usize) -> u64 {
        self.parts[owner].address() + (rank * 2 * CAPACITY * 4) as u64
    }

    /// What makes a product this rank's part of the next sum; [`NormEnd::norm`] is to follow it.
    pub(super) fn sending(&self) -> Sending {
        Sending {
            own: self.parts_of(self.rank, self.rank),
            other: self.parts_of(self.rank, 1 - self.rank),
            turn: self.state.address(),
            half: CAPACITY as u32,
            unused: 0,
        }
    }

    /// Puts the sum of what both ranks have sent at `x`, f32 rows, and its root-mean-square norm at `out`. `weight`: where the norm's is,
    /// and a row's width. So many rows of the norm lie by lane, or none.
    ///
    /// # Errors
    /// [`CudaError::RankLeft`] or [`CudaError::Driver`].
    pub(super) fn norm(
        &self,
        (x, rows): (u64, usize),
        (weight, width): (u64, usize),
        eps: f32,
        (out, rows_by_lane): (u64, usize),
    ) -> Result<(), CudaError> {
        assert!(self.takes(rows * width), "a sum that fits");
        self.abandoned.check()?;
        if rows == 0 {
            return Ok(());
        }
        let args = PeerNormArgs {
            x,
            weight,
            out,
            parts: [0, 1].map(|rank| self.parts_of(rank, self.rank)),
            state: self.state.address(),
            abandoned: self.abandoned.address(),
            half: CAPACITY as u32,
            width: width as u32,
            rank: self.rank as u32,
            eps,
            rows_by_lane: rows_by_lane as u32,
            padding: 0,
        };
        let launch = blocks((rows as u32, 1, 1));
        let kernel = self.device.kernel(Kernel::PEER_NORM, &self.options)?;
        // SAFETY: x and out hold the rows, weight one; parts, state and the word on the host live as long as this end, and every pass is
        // waited for before its end can be dropped.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&args);
            })
        }
    }
}
