//! Launches of the kernels that work row by row.

use bytemuck::{Pod, Zeroable};

use super::batch::DeviceBatch;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::recording::LaunchShape;
use crate::backend::AttentionShape;

/// Blocks of 256 threads, one per row or as many as cover the elements.
pub(super) fn blocks(grid: (u32, u32, u32)) -> LaunchShape {
    LaunchShape {
        grid,
        threads: 256,
        shared_bytes: 0,
    }
}

/// Row-wise kernels of one 16-bit type.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowKernels<'a> {
    pub(super) device: &'a Device,
    pub(super) half_is_f16: bool,
}

/// Mirrors `RotateArgs` in elementwise.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct RotateArgs {
    pub(super) qkv: u64,
    pub(super) angles: u64,
    pub(super) q_norm: u64,
    pub(super) k_norm: u64,
    pub(super) q: u64,
    pub(super) kv: u64,
    pub(super) spans: u64,
    pub(super) row_spans: u64,
    pub(super) block_tables: u64,
    pub(super) num_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) eps: f32,
}

/// Everything that [`RowKernels`] may launch in a forward.
pub(super) fn variants(half_is_f16: bool) -> impl Iterator<Item = Variant> {
    const KERNELS: [Kernel; 10] = [
        Kernel::EMBED,
        Kernel::RMS_NORM,
        Kernel::GATHER_ROWS,
        Kernel::ROTARY_ANGLES,
        Kernel::ROTATE_AND_STORE,
        Kernel::GATED_SILU,
        Kernel::ENTRY_MASSES,
        Kernel::ADD_BIASES,
        Kernel::ROW_ARGMAX,
        Kernel::SUM_RANKS,
    ];
    KERNELS.into_iter().map(move |kernel| Variant {
        kernel,
        options: vec![("HALF_IS_F16", u32::from(half_is_f16))],
    })
}

/// Which of a matrix's pseudo-random numbers a fill takes, in elements: rows of `columns`, `stride` apart, from `first` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct RandomGrid {
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl RandomGrid {
    /// One row.
    pub(super) fn row(elements: usize) -> Self {
        Self {
            columns: elements.max(1),
            stride: elements,
            first: 0,
        }
    }
}

// Every launch below trusts its caller for the sizes that its comment names; all callers are in this module's parent.
impl RowKernels<'_> {
    fn kernel(&self, kernel: Kernel) -> Result<cudarc::driver::CudaFunction, CudaError> {
        self.device
            .kernel(kernel, &[("HALF_IS_F16", u32::from(self.half_is_f16))])
    }

    /// `out[row] = table[tokens[row]]`, widened.
    pub(super) fn embed(
        &self,
        (table, width): (u64, usize),
        (tokens, rows): (u64, usize),
        out: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::EMBED)?;
        let width = width as u32;
        // SAFETY: tokens are below the table's rows, which the model checks; out holds `rows` rows.
        unsafe {
            self.device
                .launch(&kernel, blocks((rows as u32, 1, 1)), |l| {
                    l.arg(&table).arg(&tokens).arg(&out).arg(&width);
                })
        }
    }

    /// Norm of f32 rows to 16-bit ones, of which so many lie by lane, or none.
    pub(super) fn rms_norm(
        &self,
        (x, rows): (u64, usize),
        (weight, width): (u64, usize),
        eps: f32,
        (out, rows_by_lane): (u64, usize),
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::RMS_NORM)?;
        let (width, rows_by_lane) = (width as u32, rows_by_lane as u32);
        // SAFETY: x and out hold `rows` rows of the weight's width.
        unsafe {
            self.device
                .launch(&kernel, blocks((rows as u32, 1, 1)), |l| {
                    l.arg(&x).arg(&weight).arg(&out).arg(&width).arg(&eps);
                    l.arg(&rows_by_lane);
                })
        }
    }

    /// The chosen f32 rows, one after another.
    pub(super) fn gather_rows(
        &self,
        x: u64,
        width: usize,
        (chosen, rows): (u64, usize),
        out: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::GATHER_ROWS)?;
        let width = width as u32;
        // SAFETY: chosen rows are rows of x; out holds `rows` rows.
        unsafe {
            self.device
                .launch(&kernel, blocks((rows as u32, 1, 1)), |l| {
                    l.arg(&x).arg(&chosen).arg(&out).arg(&width);
                })
        }
    }

    /// Cosines and sines of every row.
    pub(super) fn rotary_angles(
        &self,
        batch: &DeviceBatch,
        rows: usize,
        (frequencies, half): (u64, usize),
        angles: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::ROTARY_ANGLES)?;
        let (positions, half) = (batch.positions(), half as u32);
        let launch = LaunchShape {
            grid: (rows as u32, 1, 1),
            threads: half.next_multiple_of(32),
            shared_bytes: 0,
        };
        // SAFETY: angles holds `rows` rows of twice `half`.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&positions).arg(&frequencies).arg(&angles).arg(&half);
            })
        }
    }

    /// Splits, norms, rotates and stores projected rows.
    pub(super) fn rotate_and_store(&self, args: &RotateArgs, rows: usize) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::ROTATE_AND_STORE)?;
        let heads = args.num_heads + 2 * args.num_kv_heads;
        let launch = LaunchShape {
            grid: (heads.div_ceil(4), rows as u32, 1),
            threads: 128,
            shared_bytes: 0,
        };
        // SAFETY: the batch's spans lie inside the store; the other buffers hold `rows` rows.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(args);
            })
        }
    }

    /// `out = silu(gate) ⊙ up` of f32 rows `[gate | up]`.
    pub(super) fn gated_silu(
        &self,
        x: u64,
        (rows, width): (usize, usize),
        out: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::GATED_SILU)?;
        let (elements, width) = ((rows * width) as u64, width as u32);
        // SAFETY: x holds rows of twice the width, out rows of the width.
        unsafe {
            self.device.launch(
                &kernel,
                blocks((elements.div_ceil(256) as u32, 1, 1)),
                |l| {
                    l.arg(&x).arg(&out).arg(&width).arg(&elements);
                },
            )
        }
    }

    /// Fills 16-bit elements with pseudo-random numbers in ±spread.
    pub(super) fn fill_random(
        &self,
        x: u64,
        elements: usize,
        grid: RandomGrid,
        (spread, seed): (f32, u32),
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::FILL_RANDOM)?;
        let elements = elements as u64;
        let (columns, stride) = (grid.columns as u64, grid.stride as u64);
        let first = grid.first as u64;
        // SAFETY: x holds the elements.
        unsafe {
            self.device.launch(
                &kernel,
                blocks((self.device.multiprocessors() * 8, 1, 1)),
                |l| {
                    l.arg(&x).arg(&spread).arg(&seed).arg(&elements);
                    l.arg(&columns).arg(&stride).arg(&first);
                },
            )
        }
    }

    /// `x = Σ parts`, rank after rank; parts are `[ranks, elements]`.
    pub(super) fn sum_ranks(
        &self,
        parts: u64,
        ranks: usize,
        (x, elements): (u64, usize),
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::SUM_RANKS)?;
        let (ranks, elements) = (ranks as u32, elements as u64);
        // SAFETY: x holds the elements, parts as many for each rank.
        unsafe {
            self.device.launch(
                &kernel,
                blocks((elements.div_ceil(256) as u32, 1, 1)),
                |l| {
                    l.arg(&parts).arg(&x).arg(&ranks).arg(&elements);
                },
            )
        }
    }

    /// Adds to single entries of f32 rows: `biases` holds that many [`crate::backend::Bias`], of distinct entries.
    pub(super) fn add_biases(
        &self,
        x: u64,
        width: usize,
        (biases, count): (u64, usize),
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::ADD_BIASES)?;
        let (width, count) = (width as u32, count as u32);
        // SAFETY: the model checks that tokens lie in the vocabulary, and rows are those of x.
        unsafe {
            self.device
                .launch(&kernel, blocks((count.div_ceil(256), 1, 1)), |l| {
                    l.arg(&x).arg(&width).arg(&biases).arg(&count);
                })
        }
    }

    /// The first of the largest of each f32 row, its value's bits above its column; [`super::batch::NONE`] for the column of a
    /// row that is not finite.
    pub(super) fn argmax(
        &self,
        (x, rows): (u64, usize),
        width: usize,
        out: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::ROW_ARGMAX)?;
        let width = width as u32;
        let launch = LaunchShape {
            grid: (rows as u32, 1, 1),
            threads: 1024,
            shared_bytes: 0,
        };
        // SAFETY: x holds `rows` rows of `width`, out `rows` 64-bit numbers.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&x).arg(&out).arg(&width);
            })
        }
    }

    /// Captured scores of `rows` rows to probabilities.
    pub(super) fn score_probabilities(
        &self,
        (scores, statistics): (u64, u64),
        rows: usize,
        (stride, length): (usize, usize),
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::SCORE_PROBABILITIES)?;
        let (stride, length) = (stride as u32, length as u32);
        // SAFETY: scores holds `rows` rows of `stride`, statistics two numbers for each.
        unsafe {
            self.device.launch(
                &kernel,
                blocks((length.div_ceil(1024).max(1), rows as u32, 1)),
                |l| {
                    l.arg(&scores).arg(&statistics).arg(&stride).arg(&length);
                },
            )
        }
    }

    /// Mean probability per KV head and key of one span's captured scores.
    pub(super) fn entry_masses(
        &self,
        (scores, statistics): (u64, u64),
        tokens: usize,
        shape: AttentionShape,
        stride: usize,
        masses: u64,
    ) -> Result<(), CudaError> {
        let kernel = self.kernel(Kernel::ENTRY_MASSES)?;
        let grid = ((stride as u32).div_ceil(256), shape.num_kv_heads as u32, 1);
        let (tokens, num_heads, stride) = (tokens as u32, shape.num_heads as u32, stride as u32);
        // SAFETY: scores holds `tokens · num_heads` rows of `stride`, masses `num_kv_heads` of them.
        unsafe {
            self.device.launch(&kernel, blocks(grid), |l| {
                l.arg(&scores)
                    .arg(&statistics)
                    .arg(&masses)
                    .arg(&tokens)
                    .arg(&num_heads)
                    .arg(&stride);
            })
        }
    }
}

impl RotateArgs {
    /// Sets the head counts and width.
    pub(super) fn with_shape(mut self, shape: AttentionShape) -> Self {
        self.num_heads = shape.num_heads as u32;
        self.num_kv_heads = shape.num_kv_heads as u32;
        self.head_dim = shape.head_dim as u32;
        self
    }
}
