//! Causal attention of long spans on the GPU: which kernel a pass gets, and how it is launched.

use bytemuck::{NoUninit, Pod, Zeroable};

use super::attention::AttentionCall;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::recording::LaunchShape;
use super::tensor_map::TensorMap;
use crate::backend::AttentionShape;
use crate::kv_cache::BLOCK_TOKENS;

/// The kernels of long spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefillKernel {
    /// Warps with 16 or 32 rows each: any GPU, any `head_dim`.
    Warps,
    /// Warpgroups with 64 rows each. On GPUs that have none, and for other widths than theirs, as [`PrefillKernel::Warps`].
    Warpgroups,
}

/// What both kernels are called with, behind queries and cache.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CommonArgs {
    out: u64,
    spans: u64,
    block_tables: u64,
    num_heads: u32,
    num_kv_heads: u32,
    scale_log2: f32,
    unused: u32,
}

impl CommonArgs {
    fn of(call: &AttentionCall<'_>) -> Self {
        Self {
            out: call.out,
            spans: call.batch.spans(),
            block_tables: call.batch.block_tables(),
            num_heads: call.shape.num_heads as u32,
            num_kv_heads: call.shape.num_kv_heads as u32,
            scale_log2: call.scale_log2(),
            unused: 0,
        }
    }
}

/// Mirrors `PrefillArgs` in attention_prefill.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PrefillArgs {
    q: u64,
    kv: u64,
    common: CommonArgs,
}

/// Mirrors `PrefillArgs` in attention_prefill_wgmma.cu.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct PrefillWgmmaArgs {
    q: TensorMap,
    kv: TensorMap,
    common: CommonArgs,
    /// To the 64 bytes that tensor maps begin on.
    padding: [u64; 3],
}

const _: () = assert!(size_of::<PrefillWgmmaArgs>().is_multiple_of(64));

/// Warps of a block by warps.
const WARPS: u32 = 4;

/// Tiles of 16 query rows that the registers of such a warp hold.
fn row_tiles(shape: &AttentionShape) -> u32 {
    if shape.head_dim <= 128 { 2 } else { 1 }
}

fn warp_options(shape: &AttentionShape, half_is_f16: u32) -> [(&'static str, u32); 3] {
    [
        ("HALF_IS_F16", half_is_f16),
        ("HEAD_DIM", shape.head_dim as u32),
        ("ROW_TILES", row_tiles(shape)),
    ]
}

/// How warpgroups take keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct WarpgroupTiling {
    head_dim: u32,
    /// Keys of a tile: as many as leave registers for their scores beside the outputs.
    keys: u32,
}

impl WarpgroupTiling {
    /// Query rows of a block.
    const ROWS: u32 = 128;
    /// Rows of a tensor copy.
    const BOX_ROWS: u32 = 64;
    /// Two warpgroups that compute, one that copies.
    const THREADS: u32 = 3 * 128;
    /// Shared memory of a block, for queries and ring.
    const SHARED_BYTES: u32 = 224 << 10;
    /// Most tiles of a ring: more would not be waited for.
    const STAGES_MOST: u32 = 6;

    /// `None` where the kernel has no instruction for the width.
    fn of(shape: &AttentionShape) -> Option<Self> {
        let keys = match shape.head_dim {
            64 | 96 | 128 => 128,
            256 => 64,
            _ => return None,
        };
        Some(Self {
            head_dim: shape.head_dim as u32,
            keys,
        })
    }

    /// Bytes of a row in shared memory: whole panels of 64 numbers.
    fn row_bytes(self) -> u32 {
        self.head_dim.next_multiple_of(64) * 2
    }

    fn stages(self) -> u32 {
        let ring = Self::SHARED_BYTES - Self::ROWS * self.row_bytes();
        (ring / (self.keys * self.row_bytes())).min(Self::STAGES_MOST)
    }

    fn shared_bytes(self) -> u32 {
        (Self::ROWS + self.stages() * self.keys) * self.row_bytes()
    }

    fn options(self, half_is_f16: u32) -> [(&'static str, u32); 4] {
        [
            ("HALF_IS_F16", half_is_f16),
            ("HEAD_DIM", self.head_dim),
            ("KEYS", self.keys),
            ("STAGES", self.stages()),
        ]
    }
}

fn warpgroup_tiling(device: &Device, shape: &AttentionShape) -> Option<WarpgroupTiling> {
    WarpgroupTiling::of(shape).filter(|_| device.has_warpgroups())
}

/// What [`prefill`] launches on this device, unless it is told otherwise.
pub(super) fn variant(device: &Device, shape: &AttentionShape, half_is_f16: u32) -> Variant {
    match warpgroup_tiling(device, shape) {
        Some(tiling) => Variant {
            kernel: Kernel::ATTENTION_PREFILL_WGMMA,
            options: tiling.options(half_is_f16).to_vec(),
        },
        None => Variant {
            kernel: Kernel::ATTENTION_PREFILL,
            options: warp_options(shape, half_is_f16).to_vec(),
        },
    }
}

/// Causal attention of long spans, by `kernel` or the fastest one.
///
/// # Errors
/// [`CudaError`].
pub(super) fn prefill(
    device: &Device,
    call: &AttentionCall<'_>,
    kernel: Option<PrefillKernel>,
) -> Result<(), CudaError> {
    let tiling = warpgroup_tiling(device, &call.shape);
    match tiling.filter(|_| kernel != Some(PrefillKernel::Warps)) {
        Some(tiling) => by_warpgroups(device, call, tiling),
        None => by_warps(device, call),
    }
}

/// Blocks of so many rows, for all heads and spans.
fn grid(call: &AttentionCall<'_>, rows: u32) -> (u32, u32, u32) {
    (
        call.shape.num_heads as u32,
        (call.batch.max_span_rows() as u32).div_ceil(rows),
        call.batch.num_spans() as u32,
    )
}

fn by_warps(device: &Device, call: &AttentionCall<'_>) -> Result<(), CudaError> {
    let shape = call.shape;
    let options = warp_options(&shape, call.kv.half_is_f16());
    let kernel = device.kernel(Kernel::ATTENTION_PREFILL, &options)?;
    let args = PrefillArgs {
        q: call.q,
        kv: call.kv.layer(call.layer),
        common: CommonArgs::of(call),
    };
    let rows = WARPS * 16 * row_tiles(&shape);
    let head_dim = shape.head_dim as u32;
    let entries = 2 * BLOCK_TOKENS as u32;
    let launch = LaunchShape {
        grid: grid(call, rows),
        threads: WARPS * 32,
        shared_bytes: rows * (head_dim * 2 + 16) + entries * (head_dim * 4 + 16),
    };
    // SAFETY: the batch describes spans inside the store; q and out hold its rows.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&args);
        })
    }
}

fn by_warpgroups(
    device: &Device,
    call: &AttentionCall<'_>,
    tiling: WarpgroupTiling,
) -> Result<(), CudaError> {
    let shape = call.shape;
    let half_is_f16 = call.kv.half_is_f16();
    let kernel = device.kernel(
        Kernel::ATTENTION_PREFILL_WGMMA,
        &tiling.options(half_is_f16),
    )?;
    let boxes = |address, sizes, rows| TensorMap::of_slices(address, sizes, rows, half_is_f16 == 1);
    let args = PrefillWgmmaArgs {
        q: boxes(
            call.q,
            (call.batch.num_rows(), shape.num_heads, shape.head_dim),
            WarpgroupTiling::BOX_ROWS,
        )?,
        kv: boxes(
            call.kv.layer(call.layer),
            (call.kv.entries(), 2, shape.head_dim),
            BLOCK_TOKENS as u32,
        )?,
        common: CommonArgs::of(call),
        padding: [0; 3],
    };
    let launch = LaunchShape {
        grid: grid(call, WarpgroupTiling::ROWS),
        threads: WarpgroupTiling::THREADS,
        shared_bytes: tiling.shared_bytes(),
    };
    // SAFETY: as above; tensor copies stay within what the maps describe.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&args);
        })
    }
}
