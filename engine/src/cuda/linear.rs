//! Products with weights: the streaming kernels, one for few rows and two for many, and cuBLAS for prompts.

use std::ffi::c_void;

use bytemuck::{NoUninit, Pod, Zeroable};
use cudarc::cublas::sys as cublas;

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::linear_wide as wide;
use super::memory::{Elements, Weight};
use super::peer_norm::Sending;
use super::recording::LaunchShape;
use crate::backend::{Epilogue, Linear};

/// Outputs of a tile of the kernel for few rows.
const TILE_OUTPUTS: usize = 16;
/// Inputs of a tile.
const TILE_INPUTS: usize = 64;
/// Warps that share a tile's outputs.
pub(super) const SPLITS: u32 = 8;

/// Most rows of x that a block takes, in eights.
const MAX_COLUMN_TILES: u32 = 8;

/// How the streaming kernel is cut for a number of rows.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Eights of rows of a block.
    column_tiles: u32,
    /// Matrices that a block multiplies with: gate and up together.
    matrices: u32,
    /// Tiles of outputs per warp.
    warp_tiles: u32,
    /// Stages of a warp's ring.
    stages: u32,
}

impl Tiling {
    /// `crowded`: there are more blocks than two for every multiprocessor.
    fn of(epilogue: Epilogue, column_tiles: u32, crowded: bool) -> Self {
        let matrices = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
        // With many rows, a warp takes two tiles of outputs for one load of x.
        // For gate and up, more than 40 rows would not fit the registers that way.
        let most = if matrices == 2 { 5 } else { 8 };
        let warp_tiles = if (3..=most).contains(&column_tiles) {
            2
        } else {
            1
        };
        let stages = match (warp_tiles, matrices) {
            // Three blocks share a multiprocessor, with registers and rings for that: what would be one and a half turns is one.
            (1, 1) if column_tiles == 1 && crowded => 4,
            // As many stages as leave the next kernel's first blocks room.
            (1, 1) if column_tiles == 1 => 5,
            (1, 1) => 6,
            (2, 2) => 3,
            _ => 5,
        };
        Self {
            column_tiles,
            matrices,
            warp_tiles,
            stages,
        }
    }

    /// Of a block.
    fn warps(self) -> u32 {
        SPLITS * self.matrices
    }

    /// Shared memory of a block.
    fn shared_bytes(self) -> u32 {
        self.warps() * self.stages * self.warp_tiles * 2048
    }

    fn options(
        self,
        half_is_f16: bool,
        epilogue: Epilogue,
        x_by_lane: bool,
    ) -> [(&'static str, u32); 6] {
        [
            ("HALF_IS_F16", u32::from(half_is_f16)),
            ("X_BY_LANE", u32::from(x_by_lane)),
            ("COLUMN_TILES", self.column_tiles),
            ("TILES", self.warp_tiles),
            ("STAGES", self.stages),
            ("EPILOGUE", epilogue_number(epilogue)),
        ]
    }
}

/// The kernels that stream weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProductKernel {
    /// For few rows.
    FewRows,
    /// For many rows and many outputs, where there are no warpgroup instructions.
    ManyRows,
    /// The same for few outputs: groups of warps share the inputs.
    ManyRowsSplit,
    /// For many rows, by warpgroup instructions: cut as rows and outputs want it, or in one of [`WARPGROUP_CUTS`](super::WARPGROUP_CUTS) ways. On
    /// GPUs that have none, as [`ProductKernel::ManyRows`].
    Warpgroups(Option<usize>),
}

/// All epilogues.
pub(super) const EPILOGUES: [Epilogue; 3] = [Epilogue::Store, Epilogue::Add, Epilogue::SwiGlu];

/// An epilogue's number in the kernels.
pub(super) fn epilogue_number(epilogue: Epilogue) -> u32 {
    match epilogue {
        Epilogue::Store => 0,
        Epilogue::Add => 1,
        Epilogue::SwiGlu => 2,
    }
}

/// Everything that the kernel for few rows is launched as.
pub(super) fn variants(half_is_f16: bool) -> impl Iterator<Item = Variant> {
    let tilings = EPILOGUES.into_iter().flat_map(|epilogue| {
        let crowded = (epilogue != Epilogue::SwiGlu).then_some((1, true));
        let sizes = (1..=MAX_COLUMN_TILES).map(|column_tiles| (column_tiles, false));
        sizes
            .chain(crowded)
            .flat_map(move |(column_tiles, crowded)| {
                let tiling = Tiling::of(epilogue, column_tiles, crowded);
                let ways: &[bool] = if column_tiles == 1 {
                    &[false, true]
                } else {
                    &[false]
                };
                ways.iter().map(move |&by_lane| (tiling, epilogue, by_lane))
            })
    });
    tilings.map(move |(tiling, epilogue, by_lane)| Variant {
        kernel: Kernel::LINEAR,
        options: tiling.options(half_is_f16, epilogue, by_lane).to_vec(),
    })
}

/// Most rows that lie by lane: those of one column of tiles.
const ROWS_BY_LANE: usize = 8;

/// What so many rows of 16-bit numbers are that a product is to take, unless it is made to take another kernel than the fastest.
pub(super) fn elements_for_product(rows: usize, width: usize) -> Elements {
    if rows <= ROWS_BY_LANE && width.is_multiple_of(TILE_INPUTS) {
        Elements::HalfByLane { rows }
    } else {
        Elements::Half
    }
}

/// Rows side by side of so many that lie by lane; of none, `bits` themselves.
pub(super) fn side_by_side(bits: Vec<u16>, rows_by_lane: usize) -> Vec<u16> {
    if rows_by_lane == 0 {
        return bits;
    }
    let width = bits.len() / rows_by_lane;
    // As `four_by_lane` in prelude.cuh says.
    let place = |row: usize, column: usize| {
        let (tile, four) = (column / TILE_INPUTS, column % TILE_INPUTS / 4);
        let of_row = (tile * rows_by_lane + row) * TILE_INPUTS;
        of_row + four % 4 * 16 + four / 4 * 4 + column % 4
    };
    let rows = (0..rows_by_lane).flat_map(|row| (0..width).map(move |column| (row, column)));
    rows.map(|(row, column)| bits[place(row, column)]).collect()
}

/// A product of `rows` rows.
pub(super) struct Product<'a> {
    /// `[rows, inputs]`, 16-bit.
    pub(super) x: u64,
    pub(super) rows: usize,
    pub(super) projections: &'a [&'a Linear<Weight>],
    pub(super) epilogue: Epilogue,
    /// `[rows, out_width]`: f32, or 16-bit for [`Epilogue::SwiGlu`].
    pub(super) out: u64,
    /// Whether x, and what [`Epilogue::SwiGlu`] leaves, lie by lane: [`Elements::HalfByLane`](super::memory::Elements).
    pub(super) by_lane: (bool, bool),
    /// Whether the 16-bit type is f16.
    pub(super) half_is_f16: bool,
    /// Where results go instead of `out`, if the product is a part of a sum over ranks: of the streaming kernels, and not with
    /// [`Epilogue::SwiGlu`].
    pub(super) sending: Sending,
}

/// Mirrors `Projection` in prelude.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ProjectionArgs {
    weight: u64,
    bias: u64,
    outputs: u32,
    first_tile: u32,
}

/// Mirrors `LinearArgs` in prelude.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct LinearArgs {
    x: u64,
    out: u64,
    projections: [ProjectionArgs; 3],
    rows: u32,
    inputs: u32,
    out_stride: u32,
    out_by_lane: u32,
    sending: Sending,
}

/// Elements per row that a product writes.
pub(super) fn out_width(projections: &[&Linear<Weight>], epilogue: Epilogue) -> usize {
    match epilogue {
        Epilogue::Store => projections.iter().map(|p| p.weight.shape().0).sum(),
        Epilogue::Add | Epilogue::SwiGlu => projections[0].weight.shape().0,
    }
}

impl Product<'_> {
    pub(super) fn inputs(&self) -> usize {
        self.projections[0].weight.shape().1
    }

    /// Of all projections.
    pub(super) fn outputs(&self) -> usize {
        self.projections.iter().map(|p| p.weight.shape().0).sum()
    }

    /// The kernels that stream weights: a row's bits depend on nothing but the row. `kernel` says which, where it is not to be the
    /// faster one.
    pub(super) fn stream(
        &self,
        device: &Device,
        kernel: Option<ProductKernel>,
    ) -> Result<(), CudaError> {
        if self.rows == 0 {
            return Ok(());
        }
        // No other kernel knows rows by lane.
        if self.by_lane != (false, false) {
            return self.narrow(device);
        }
        let wide = |sharing| self.wide(device, wide::Tiling::of(self.rows, sharing));
        match kernel {
            None if device.has_warpgroups() => match self.warpgroup_tiling(device) {
                Some(tiling) => self.by_warpgroups(device, tiling),
                None => self.narrow(device),
            },
            None => match self.wide_tiling(device) {
                Some(tiling) => self.wide(device, tiling),
                None => self.narrow(device),
            },
            Some(ProductKernel::FewRows) => self.narrow(device),
            Some(ProductKernel::Warpgroups(cut)) if device.has_warpgroups() => {
                self.by_warpgroups(device, self.forced_tiling(device, cut))
            }
            Some(ProductKernel::ManyRows | ProductKernel::Warpgroups(_)) => {
                wide(wide::Sharing::Whole)
            }
            Some(ProductKernel::ManyRowsSplit) => wide(wide::Sharing::Split),
        }
    }

    /// The arguments of a kernel whose tiles have so many outputs, and the number of tiles; a projection begins at a multiple of
    /// `aligned` tiles.
    pub(super) fn arguments(&self, tile_outputs: usize, aligned: usize) -> (LinearArgs, u32) {
        let mut projections = [ProjectionArgs {
            weight: 0,
            bias: 0,
            outputs: 0,
            first_tile: u32::MAX,
        }; 3];
        let mut tiles = 0;
        for (args, p) in projections.iter_mut().zip(self.projections) {
            let outputs = p.weight.shape().0;
            *args = ProjectionArgs {
                weight: p.weight.address(),
                bias: p.bias.as_ref().map_or(0, Weight::address),
                outputs: outputs as u32,
                first_tile: tiles,
            };
            let own = outputs.div_ceil(tile_outputs).next_multiple_of(aligned) as u32;
            // Gate and up are computed by the same blocks; others begin on a block of their own.
            let shared = self.epilogue == Epilogue::SwiGlu;
            tiles = if shared { own } else { tiles + own };
        }
        let args = LinearArgs {
            x: self.x,
            out: self.out,
            projections,
            rows: self.rows as u32,
            inputs: self.inputs() as u32,
            out_stride: out_width(self.projections, self.epilogue) as u32,
            out_by_lane: u32::from(self.by_lane.1),
            sending: self.sending,
        };
        (args, tiles)
    }

    /// Weights are streamed once per 64 rows, x once per tile or two of outputs.
    fn narrow(&self, device: &Device) -> Result<(), CudaError> {
        let column_tiles = self.rows.div_ceil(8).min(MAX_COLUMN_TILES as usize) as u32;
        let blocks = self.outputs().div_ceil(TILE_OUTPUTS) as u32;
        let crowded = blocks > 2 * device.multiprocessors();
        let tiling = Tiling::of(self.epilogue, column_tiles, crowded);
        let options = tiling.options(self.half_is_f16, self.epilogue, self.by_lane.0);
        let (args, tiles) = self.arguments(TILE_OUTPUTS, tiling.warp_tiles as usize);
        let launch = LaunchShape {
            grid: (
                tiles / tiling.warp_tiles,
                (self.rows as u32).div_ceil(8 * column_tiles),
                1,
            ),
            threads: tiling.warps() * 32,
            shared_bytes: tiling.shared_bytes(),
        };
        self.launch(device, (Kernel::LINEAR, &options), launch, &args)
    }

    /// Of so many outputs of a block, those of one matrix: gate and up share it.
    pub(super) fn own_outputs(&self, block_outputs: u32) -> u32 {
        match self.epilogue {
            Epilogue::SwiGlu => block_outputs / 2,
            Epilogue::Store | Epilogue::Add => block_outputs,
        }
    }

    /// Launches a streaming kernel with its only argument.
    pub(super) fn launch(
        &self,
        device: &Device,
        (kernel, options): (Kernel, &[(&'static str, u32)]),
        shape: LaunchShape,
        args: &impl NoUninit,
    ) -> Result<(), CudaError> {
        let kernel = device.kernel(kernel, options)?;
        // SAFETY: weights have the shapes given, x and out hold `rows` rows of them.
        unsafe {
            device.launch(&kernel, shape, |l| {
                l.arg(args);
            })
        }
    }

    /// cuBLAS: `out` rows take f32 products side by side, added to what is there for [`Epilogue::Add`]. For [`Epilogue::SwiGlu`] they are
    /// `[gate | up]` and go to `out` as f32, without biases or activation.
    pub(super) fn library(&self, device: &Device) -> Result<(), CudaError> {
        device.interrupt();
        let inputs = self.inputs();
        let stride = match self.epilogue {
            Epilogue::SwiGlu => 2 * self.projections[0].weight.shape().0,
            _ => out_width(self.projections, self.epilogue),
        };
        let (one, zero) = (1.0f32, 0.0f32);
        let beta = if self.epilogue == Epilogue::Add {
            &one
        } else {
            &zero
        };
        let half = if self.half_is_f16 {
            cublas::cudaDataType::CUDA_R_16F
        } else {
            cublas::cudaDataType::CUDA_R_16BF
        };
        let mut offset = 0u64;
        for p in self.projections {
            let outputs = p.weight.shape().0;
            // Column-major, as cuBLAS reads: outᵀ[outputs, rows] = W · xᵀ.
            // SAFETY: weights have the shapes given, x and out hold `rows` rows of them; the scalars live on this stack.
            let result = unsafe {
                cudarc::cublas::result::gemm_ex(
                    device.cublas(),
                    cublas::cublasOperation_t::CUBLAS_OP_T,
                    cublas::cublasOperation_t::CUBLAS_OP_N,
                    outputs as i32,
                    self.rows as i32,
                    inputs as i32,
                    (&raw const one).cast(),
                    p.weight.address() as *const c_void,
                    half,
                    inputs as i32,
                    self.x as *const c_void,
                    half,
                    inputs as i32,
                    (&raw const *beta).cast(),
                    (self.out + 4 * offset) as *mut c_void,
                    cublas::cudaDataType::CUDA_R_32F,
                    stride as i32,
                    cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                    cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
                )
            };
            result.map_err(CudaError::Cublas)?;
            if let Some(bias) = &p.bias {
                add_bias(
                    device,
                    (self.out + 4 * offset, bias),
                    (self.rows, outputs, stride),
                )?;
            }
            offset += outputs as u64;
        }
        Ok(())
    }
}

/// Adds a bias to `rows` rows of `width` in a matrix of `stride`.
fn add_bias(
    device: &Device,
    (x, bias): (u64, &Weight),
    (rows, width, stride): (usize, usize, usize),
) -> Result<(), CudaError> {
    let kernel = device.kernel(Kernel::ADD_BIAS, &[])?;
    let (bias, elements) = (bias.address(), (rows * width) as u64);
    let (width, stride) = (width as u32, stride as u32);
    let launch = LaunchShape {
        grid: (elements.div_ceil(256) as u32, 1, 1),
        threads: 256,
        shared_bytes: 0,
    };
    // SAFETY: the bias has `width` elements and x has the rows.
    unsafe {
        device.launch(&kernel, launch, |l| {
            l.arg(&x).arg(&bias).arg(&width).arg(&stride).arg(&elements);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_by_lane_are_read_side_by_side() {
        let (rows, width) = (3, 128);
        // A number says where it belongs: its row and column.
        let number = |row: usize, column: usize| (row * width + column) as u16;
        let mut by_lane = vec![0; rows * width];
        for row in 0..rows {
            for column in 0..width {
                // [tile][row][lane][instruction][4]: of 16 inputs of an instruction, a lane has four.
                let (tile, in_tile) = (column / 64, column % 64);
                let (instruction, lane) = (in_tile / 16, in_tile % 16 / 4);
                let at = (((tile * rows + row) * 4 + lane) * 4 + instruction) * 4 + column % 4;
                by_lane[at] = number(row, column);
            }
        }
        let in_order: Vec<u16> = (0..rows * width).map(|at| at as u16).collect();
        assert_eq!(side_by_side(by_lane, rows), in_order);
        assert_eq!(side_by_side(in_order.clone(), 0), in_order);
        assert_eq!(elements_for_product(8, 128).rows_by_lane(), 8);
        assert_eq!(elements_for_product(9, 128).rows_by_lane(), 0);
        assert_eq!(elements_for_product(1, 72).rows_by_lane(), 0);
    }

    /// Shared memory of a multiprocessor that blocks may take, each with a kibibyte of the system's.
    const SHARED_BYTES: u32 = 228 << 10;

    #[test]
    fn a_third_block_fits_where_it_spares_a_turn() {
        for epilogue in [Epilogue::Store, Epilogue::Add] {
            let together = |crowded| {
                let tiling = Tiling::of(epilogue, 1, crowded);
                SHARED_BYTES / (tiling.shared_bytes() + 1024)
            };
            assert_eq!([together(false), together(true)], [2, 3]);
        }
    }
}
