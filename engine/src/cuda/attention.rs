//! Attention on the GPU: what a call of it is, and that of few rows per span: with what options its kernels run, and the scratch memory of
//! split heads.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::batch::DeviceBatch;
use super::chunks::Chunks;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::kv_store::KvStore;
use super::memory::DeviceMemory;
use super::recording::LaunchShape;
use crate::backend::AttentionShape;

/// Pipelines of a block, with a warp for each tile of rows.
const PARTS: u32 = 4;
/// Most tiles of 16 query rows per block.
const MAX_ROW_TILES: usize = 2;

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
    /// What scores are multiplied with, for powers of two.
    pub(super) fn scale_log2(&self) -> f32 {
        std::f32::consts::LOG2_E / (self.shape.head_dim as f32).sqrt()
    }
}

/// Where the scores of capturing spans go: `[capturing span][tokens][num_heads][stride]` of one layer, by key.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScoreTarget {
    pub(super) scores: u64,
    /// `[capturing span][tokens][num_heads]`: maximum and sum, f32 each.
    pub(super) statistics: u64,
    /// Tokens per capturing span: the most that one has, or 1 for its last.
    pub(super) tokens: usize,
    /// Whether scores of the last token of each span are all that is wanted.
    pub(super) last_only: bool,
    pub(super) stride: usize,
}

/// Mirrors `DecodeArgs` in attention_decode.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
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
    scores: u64,
    score_statistics: u64,
    num_heads: u32,
    num_kv_heads: u32,
    layer: u32,
    score_tokens: u32,
    score_stride: u32,
    scale_log2: f32,
}

/// Mirrors `MergeArgs` in attention_merge.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MergeArgs {
    partials: u64,
    statistics: u64,
    out: u64,
    spans: u64,
    row_spans: u64,
    list_ranges: u64,
    score_statistics: u64,
    num_heads: u32,
    num_kv_heads: u32,
    layer: u32,
    score_tokens: u32,
    row_tiles: u32,
    scale_log2: f32,
}

/// Partial results of heads that several blocks work on.
pub(super) struct DecodeScratch {
    partials: DeviceMemory,
    statistics: DeviceMemory,
}

impl DecodeScratch {
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            partials: DeviceMemory::new(device),
            statistics: DeviceMemory::new(device),
        }
    }

    fn reserve(&mut self, rows: usize, head_dim: usize) -> Result<(), CudaError> {
        self.partials.grow(rows * head_dim * 2)?;
        self.statistics.grow(rows * 8)?;
        Ok(())
    }
}

/// Stages of a part's ring.
fn decode_stages(shape: &AttentionShape) -> u32 {
    if shape.head_dim <= 64 { 4 } else { 3 }
}

/// Sixteens of numbers of a query that stay in registers, in place of being read for every tile of keys. These are the registers that merging
/// would have while the last blocks run: not worth it where all blocks run at once.
fn kept_queries(shape: &AttentionShape, row_tiles: usize, scores: u32, crowded: bool) -> u32 {
    let fits = shape.head_dim == 128 && row_tiles == 2 && scores == 0;
    if fits && crowded { 6 } else { 0 }
}

/// Whether entries lie swizzled in shared memory, as lines of the memory they come from. Where all blocks run at once, and two tiles of rows share an
/// entry, the instructions that find them take longer than the copies spare.
fn swizzles(shape: &AttentionShape, row_tiles: usize, scores: u32, crowded: bool) -> bool {
    shape.head_dim == 128 && scores == 0 && (row_tiles == 1 || crowded)
}

/// Bytes from one entry to the next in shared memory; as `ENTRY_STRIDE` in attention_decode.cu.
fn entry_stride(head_dim: u32, swizzled: bool) -> u32 {
    if swizzled {
        (head_dim * 4).next_multiple_of(128)
    } else {
        head_dim * 4 + 16
    }
}

/// `scores`: 0 none, 1 those of all tokens, 2 those of last tokens. `crowded`: there are more blocks than two for every multiprocessor.
fn decode_options(
    (shape, half_is_f16): (&AttentionShape, u32),
    chunks: Chunks,
    (row_tiles, crowded): (usize, bool),
    scores: u32,
) -> [(&'static str, u32); 9] {
    let swizzled = swizzles(shape, row_tiles, scores, crowded);
    [
        ("HALF_IS_F16", half_is_f16),
        ("HEAD_DIM", shape.head_dim as u32),
        ("ROW_TILES", row_tiles as u32),
        ("SMALLEST", chunks.smallest() as u32),
        ("CHUNK", chunks.largest() as u32),
        ("CAPTURE", scores),
        ("STAGES", decode_stages(shape)),
        ("KEPT", kept_queries(shape, row_tiles, scores, crowded)),
        ("SWIZZLED", u32::from(swizzled)),
    ]
}

/// Those of [`decode_options`] that merging depends on, and how many chunks it reads at once: all that a row is likely to have where
/// few blocks merge, so that their registers are not missed.
fn merge_options(
    [half, head_dim, row_tiles, smallest, chunk, capture, ..]: [(&'static str, u32); 9],
    few_blocks: bool,
) -> [(&'static str, u32); 7] {
    let at_a_time = ("AT_A_TIME", if few_blocks { 32 } else { 16 });
    [
        half, head_dim, row_tiles, smallest, chunk, capture, at_a_time,
    ]
}

/// Everything that [`decode`], with keys cut into `chunks`, may launch.
pub(super) fn variants(shape: &AttentionShape, half_is_f16: u32, chunks: Chunks) -> Vec<Variant> {
    let mut variants = Vec::new();
    for row_tiles in 1..=MAX_ROW_TILES {
        for scores in 0..=2 {
            let [alone, crowded] = [false, true].map(|crowded| {
                decode_options((shape, half_is_f16), chunks, (row_tiles, crowded), scores)
            });
            let decode = |options: [_; 9]| Variant {
                kernel: Kernel::ATTENTION_DECODE,
                options: options.to_vec(),
            };
            variants.push(decode(alone));
            variants.extend((crowded != alone).then(|| decode(crowded)));
            for few_blocks in [false, true] {
                variants.push(Variant {
                    kernel: Kernel::ATTENTION_MERGE,
                    options: merge_options(alone, few_blocks).to_vec(),
                });
            }
        }
    }
    variants
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
    let units = batch.num_units();
    if units == 0 || rows == 0 {
        return Ok(());
    }
    let row_tiles = rows.div_ceil(16).min(MAX_ROW_TILES);
    let grid_rows = rows.div_ceil(16 * row_tiles);
    let stages = decode_stages(&shape);
    let places = units * shape.num_kv_heads * grid_rows;
    scratch.reserve(places * 16 * row_tiles, shape.head_dim)?;
    let scores = capture.map_or(0, |target| if target.last_only { 2 } else { 1 });
    let crowded = places > 2 * device.multiprocessors() as usize;
    let options = decode_options(
        (&shape, call.kv.half_is_f16()),
        batch.chunks(),
        (row_tiles, crowded),
        scores,
    );
    let kernel = device.kernel(Kernel::ATTENTION_DECODE, &options)?;
    let target = capture.unwrap_or(ScoreTarget {
        scores: 0,
        statistics: 0,
        tokens: 0,
        last_only: false,
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
    let swizzled = swizzles(&shape, row_tiles, scores, crowded);
    let (entry, query) = (entry_stride(head_dim, swizzled), head_dim * 2 + 16);
    let launch = LaunchShape {
        grid: ((units * shape.num_kv_heads) as u32, grid_rows as u32, 1),
        threads: PARTS * row_tiles as u32 * 32,
        shared_bytes: 16 * row_tiles as u32 * query + PARTS * stages * 16 * entry,
    };
    // SAFETY: the batch describes spans inside the store; outputs and scratch were sized above for this grid.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&args);
        })
    }?;
    if !batch.has_pieces() {
        return Ok(());
    }
    let few_blocks = batch.num_rows() * shape.num_kv_heads <= 2 * device.multiprocessors() as usize;
    let kernel = device.kernel(Kernel::ATTENTION_MERGE, &merge_options(options, few_blocks))?;
    let merge = MergeArgs {
        partials: args.partials,
        statistics: args.statistics,
        out: args.out,
        spans: batch.cut_spans(),
        row_spans: batch.row_spans(),
        list_ranges: args.list_ranges,
        score_statistics: args.score_statistics,
        num_heads: args.num_heads,
        num_kv_heads: args.num_kv_heads,
        layer: args.layer,
        score_tokens: args.score_tokens,
        row_tiles: grid_rows as u32,
        scale_log2: args.scale_log2,
    };
    let launch = LaunchShape {
        grid: (args.num_kv_heads, batch.num_rows() as u32, 1),
        threads: (group as u32 * 32).min(256),
        shared_bytes: 0,
    };
    // SAFETY: as above; every chunk of a head that has several has left its partial result.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&merge);
        })
    }
}
