//! Attention on the GPU: which kernel a pass gets, with what options, and the scratch memory of split heads.

use std::sync::Arc;

use cudarc::driver::{DeviceRepr, PushKernelArg};

use super::batch::DeviceBatch;
use super::device::{Device, LaunchShape};
use super::error::CudaError;
use super::kernel_cache::Kernel;
use super::kv_store::KvStore;
use super::memory::DeviceMemory;
use crate::backend::AttentionShape;

/// Warps per block, in both kernels.
const WARPS: u32 = 4;

/// Keys per unit of decode attention: constant per model, so that a row's bits depend on its own keys alone. With
/// wide groups the partial results of a unit are larger, so the unit is, too.
pub(super) fn decode_chunk(shape: &AttentionShape) -> usize {
    if shape.num_heads / shape.num_kv_heads <= 2 {
        512
    } else {
        1024
    }
}

/// Attention of one layer.
pub(super) struct AttentionCall<'a> {
    pub(super) shape: AttentionShape,
    /// Rotated queries, `[rows, num_heads, head_dim]`, 16-bit.
    pub(super) q: u64,
    pub(super) kv: &'a KvStore,
    pub(super) layer: usize,
    /// `[rows, num_heads, head_dim]`, 16-bit.
    pub(super) out: u64,
    pub(super) batch: &'a DeviceBatch,
}

impl AttentionCall<'_> {
    fn scale_log2(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt()
    }
}

/// Where the scores of capturing spans go: `[capturing span][tokens][num_heads][stride]` of one layer, by key.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScoreTarget {
    pub(super) scores: u64,
    /// `[capturing span][tokens][num_heads]`: maximum and sum, f32 each.
    pub(super) statistics: u64,
    /// Most tokens of a span.
    pub(super) tokens: usize,
    pub(super) stride: usize,
}

/// Mirrors `DecodeArgs` in attention_decode.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct DecodeArgs {
    q: u64,
    kv: u64,
    out: u64,
    units: u64,
    block_tables: u64,
    list_ranges: u64,
    list_slots: u64,
    partials: u64,
    statistics: u64,
    arrivals: u64,
    scores: u64,
    score_statistics: u64,
    num_heads: u32,
    num_kv_heads: u32,
    layer: u32,
    score_tokens: u32,
    score_stride: u32,
    scale_log2: f32,
}

// SAFETY: plain numbers in the kernel's layout.
unsafe impl DeviceRepr for DecodeArgs {}

/// Mirrors `PrefillArgs` in attention_prefill.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct PrefillArgs {
    q: u64,
    kv: u64,
    out: u64,
    spans: u64,
    block_tables: u64,
    num_heads: u32,
    num_kv_heads: u32,
    scale_log2: f32,
}

// SAFETY: plain numbers in the kernel's layout.
unsafe impl DeviceRepr for PrefillArgs {}

/// Partial results of heads that several blocks work on.
pub(super) struct DecodeScratch {
    partials: DeviceMemory,
    statistics: DeviceMemory,
    /// Counters, zero between launches.
    arrivals: DeviceMemory,
}

impl DecodeScratch {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            partials: DeviceMemory::new(device),
            statistics: DeviceMemory::new(device),
            arrivals: DeviceMemory::new(device),
        }
    }

    fn reserve(&mut self, rows: usize, head_dim: usize, counters: usize) -> Result<(), CudaError> {
        // Powers of two: lengths change from pass to pass, and growing waits for the device.
        let grow = |memory: &mut DeviceMemory, bytes: usize| {
            if bytes > memory.bytes() {
                memory.reserve(bytes.next_power_of_two())
            } else {
                Ok(false)
            }
        };
        grow(&mut self.partials, rows * head_dim * 4)?;
        grow(&mut self.statistics, rows * 8)?;
        if grow(&mut self.arrivals, counters * 4)? {
            self.arrivals.zero()?;
        }
        Ok(())
    }
}

/// Attention of few rows per span, dense or by list; scores of the capturing spans go to `capture` where one is given.
pub(super) fn decode(
    device: &Device,
    call: &AttentionCall<'_>,
    scratch: &mut DecodeScratch,
    capture: Option<ScoreTarget>,
) -> Result<(), CudaError> {
    let (shape, batch) = (call.shape, call.batch);
    let group = shape.num_heads / shape.num_kv_heads;
    let rows = batch.max_span_rows() * group;
    let (units, num_spans) = (batch.num_units(), batch.num_spans());
    if units == 0 || rows == 0 {
        return Ok(());
    }
    let row_tiles: usize = if rows > 16 && shape.head_dim <= 128 {
        2
    } else {
        1
    };
    let grid_rows = rows.div_ceil(16 * row_tiles);
    let stages: u32 = if shape.head_dim <= 64 { 4 } else { 3 };
    let places = units * shape.num_kv_heads * grid_rows;
    scratch.reserve(
        places * 16 * row_tiles,
        shape.head_dim,
        num_spans * shape.num_kv_heads * grid_rows,
    )?;
    let options = [
        ("HALF_IS_F16", call.kv.half_is_f16()),
        ("HEAD_DIM", shape.head_dim as u32),
        ("ROW_TILES", row_tiles as u32),
        ("STAGES", stages),
        ("CHUNK", batch.chunk() as u32),
        ("CAPTURE", u32::from(capture.is_some())),
    ];
    let kernel = device.kernel(Kernel::ATTENTION_DECODE, &options)?;
    let target = capture.unwrap_or(ScoreTarget {
        scores: 0,
        statistics: 0,
        tokens: 0,
        stride: 0,
    });
    let args = DecodeArgs {
        q: call.q,
        kv: call.kv.layer(call.layer),
        out: call.out,
        units: batch.units(),
        block_tables: batch.block_tables(),
        list_ranges: batch.list_ranges(),
        list_slots: batch.list_slots(),
        partials: scratch.partials.address(),
        statistics: scratch.statistics.address(),
        arrivals: scratch.arrivals.address(),
        scores: target.scores,
        score_statistics: target.statistics,
        num_heads: shape.num_heads as u32,
        num_kv_heads: shape.num_kv_heads as u32,
        layer: call.layer as u32,
        score_tokens: target.tokens as u32,
        score_stride: target.stride as u32,
        scale_log2: call.scale_log2(),
    };
    let head_dim = shape.head_dim as u32;
    let (entry, query) = (head_dim * 4 + 16, head_dim * 2 + 16);
    let launch = LaunchShape {
        grid: (units as u32, shape.num_kv_heads as u32, grid_rows as u32),
        threads: WARPS * 32,
        shared_bytes: 16 * row_tiles as u32 * query + WARPS * stages * 16 * entry,
    };
    // SAFETY: the batch describes spans inside the store; outputs and scratch were sized above for this grid.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&args);
        })
    }
}

/// Causal attention of long spans.
pub(super) fn prefill(device: &Device, call: &AttentionCall<'_>) -> Result<(), CudaError> {
    let (shape, batch) = (call.shape, call.batch);
    let row_tiles: u32 = if shape.head_dim <= 128 { 2 } else { 1 };
    let head_dim = shape.head_dim as u32;
    let options = [
        ("HALF_IS_F16", call.kv.half_is_f16()),
        ("HEAD_DIM", head_dim),
        ("ROW_TILES", row_tiles),
    ];
    let kernel = device.kernel(Kernel::ATTENTION_PREFILL, &options)?;
    let args = PrefillArgs {
        q: call.q,
        kv: call.kv.layer(call.layer),
        out: call.out,
        spans: batch.spans(),
        block_tables: batch.block_tables(),
        num_heads: shape.num_heads as u32,
        num_kv_heads: shape.num_kv_heads as u32,
        scale_log2: call.scale_log2(),
    };
    let rows = WARPS * 16 * row_tiles;
    let launch = LaunchShape {
        grid: (
            shape.num_heads as u32,
            (batch.max_span_rows() as u32).div_ceil(rows),
            batch.num_spans() as u32,
        ),
        threads: WARPS * 32,
        shared_bytes: rows * (head_dim * 2 + 16) + 2 * 64 * (head_dim * 4 + 16),
    };
    // SAFETY: the batch describes spans inside the store; q and out hold its rows.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&args);
        })
    }
}
