//! The streaming kernel of warpgroup instructions, for many rows on Hopper: how a product is cut for it.
//!
//! Its bits are those of the kernel for few rows, so that which of them serves a batch is a matter of speed alone.

use bytemuck::{NoUninit, Zeroable};

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::linear::{EPILOGUES, LinearArgs, Product, SPLITS, epilogue_number};
use super::recording::LaunchShape;
use super::tensor_map::TensorMap;
use crate::backend::Epilogue;

/// Rows from which this kernel is the faster one, where there are blocks enough.
const FROM_ROWS: usize = 9;
/// Fewest blocks for which it is; more of them share a product's inputs until there are as many.
const BLOCKS_LEAST: u32 = 96;

/// Rows of a block: of an instruction, and instructions.
const ROWS: [(u32, u32); 9] = [
    (16, 1),
    (32, 1),
    (40, 1),
    (48, 1),
    (64, 1),
    (80, 1),
    (48, 2),
    (64, 2),
    (80, 2),
];
/// Shared memory of a multiprocessor for rings.
const RING_BYTES: u32 = 224 << 10;
/// Most stages of a ring: with more, a block would only start later, and the next kernel's, too.
const STAGES_MOST: u32 = 8;

/// How outputs and inputs are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    /// Sixty-fours of outputs per block.
    groups: u32,
    /// Blocks that share inputs.
    cluster: u32,
    /// Most rows of which the registers hold a block's sums.
    rows_most: u32,
    /// Most rows for which two blocks may share a multiprocessor: registers and ring of one are half of what there is.
    rows_shared: u32,
}

/// Most rows for which registers allow a warp for copies alone: of blocks that have a multiprocessor for themselves, and of those that share it.
const COPIER_ROWS: [u32; 2] = [96, 48];

/// How many ways there are to cut outputs and inputs, coarsest first.
pub const WARPGROUP_CUTS: usize = 3;

/// Ways to cut, coarsest first.
const CUTS: [Cut; WARPGROUP_CUTS] = [
    Cut {
        groups: 2,
        cluster: 1,
        rows_most: 160,
        rows_shared: 64,
    },
    Cut {
        groups: 1,
        cluster: 2,
        rows_most: 96,
        rows_shared: 80,
    },
    Cut {
        groups: 1,
        cluster: 4,
        rows_most: 96,
        rows_shared: 80,
    },
];

/// Mirrors `WgmmaArgs` in linear_wgmma.cu.
#[repr(C)]
#[derive(Clone, Copy, NoUninit, Zeroable)]
struct WgmmaArgs {
    x: TensorMap,
    weights: [TensorMap; 3],
    product: LinearArgs,
    /// To the 64 bytes that tensor maps begin on.
    padding: [u64; 7],
}

const _: () = assert!(size_of::<WgmmaArgs>().is_multiple_of(64));

/// How a product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Rows of an instruction, and instructions for a block's rows.
    rows: (u32, u32),
    cut: Cut,
    /// Blocks that share a multiprocessor.
    resident: u32,
}

impl Tiling {
    /// For so many rows and outputs: row groups of about the same size, blocks as coarse as keeps the GPU busy; `None` where there
    /// are too few blocks.
    fn of(rows: usize, outputs: usize, multiprocessors: u32) -> Option<Self> {
        let tilings = CUTS.map(|cut| Self::with(cut, (rows, outputs), multiprocessors));
        let enough = |tiling: &Self| tiling.blocks(rows, outputs) >= BLOCKS_LEAST;
        tilings.into_iter().find(enough)
    }

    fn with(cut: Cut, (rows, outputs): (usize, usize), multiprocessors: u32) -> Self {
        let of_group = (rows as u32).div_ceil((rows as u32).div_ceil(cut.rows_most));
        let fitting = ROWS.into_iter().find(|r| of_group <= r.0 * r.1);
        let alone = Self {
            rows: fitting.expect("the last one has as many rows as any cut"),
            cut,
            resident: 1,
        };
        let shared = Self {
            resident: 2,
            ..alone
        };
        // Blocks that are no more than multiprocessors would share none.
        if shared.fits() && shared.blocks(rows, outputs) > multiprocessors {
            shared
        } else {
            alone
        }
    }

    /// Whether its rows are not too many for so many blocks on a multiprocessor.
    fn fits(&self) -> bool {
        let most = match self.resident {
            1 => self.cut.rows_most,
            _ => self.cut.rows_shared,
        };
        self.block_rows() <= most
    }

    /// Rows of a block.
    fn block_rows(self) -> u32 {
        self.rows.0 * self.rows.1
    }

    /// Outputs of a block, of all matrices.
    fn outputs(self) -> u32 {
        64 * self.cut.groups
    }

    /// Blocks of a product of so many rows and outputs.
    fn blocks(self, rows: usize, outputs: usize) -> u32 {
        self.cut.cluster
            * (outputs as u32).div_ceil(self.outputs())
            * (rows as u32).div_ceil(self.block_rows())
    }

    /// Whether a warp is there for copies alone.
    fn has_copier(self) -> bool {
        self.block_rows() <= COPIER_ROWS[self.resident as usize - 1]
    }

    fn threads(self) -> u32 {
        128 * self.cut.groups + if self.has_copier() { 32 } else { 0 }
    }

    /// Splits that a block walks through together: in a cluster all of a block's, else two if the registers hold their sums and
    /// those of the ones before.
    fn together(self) -> u32 {
        match self.cut.cluster {
            1 if self.block_rows() > 128 => 1,
            1 => 2,
            cluster => SPLITS / cluster,
        }
    }

    fn stage_bytes(self) -> u32 {
        (self.outputs() + self.block_rows()) * 128
    }

    /// What the block before hands on.
    fn handed_bytes(self) -> u32 {
        match self.cut.cluster {
            1 => 0,
            _ => self.block_rows() * self.outputs() * 4,
        }
    }

    fn stages(self) -> u32 {
        let room = RING_BYTES / self.resident - self.handed_bytes();
        (room / self.stage_bytes()).min(STAGES_MOST)
    }

    /// Shared memory of a block.
    fn shared_bytes(self) -> u32 {
        self.stages() * self.stage_bytes() + self.handed_bytes()
    }

    fn options(self, half_is_f16: bool, epilogue: Epilogue) -> [(&'static str, u32); 10] {
        [
            ("HALF_IS_F16", u32::from(half_is_f16)),
            ("COLUMNS", self.rows.0),
            ("COLUMN_BLOCKS", self.rows.1),
            ("GROUPS", self.cut.groups),
            ("COPIER", u32::from(self.has_copier())),
            ("CLUSTER", self.cut.cluster),
            ("TOGETHER", self.together()),
            ("STAGES", self.stages()),
            ("BLOCKS", self.resident),
            ("EPILOGUE", epilogue_number(epilogue)),
        ]
    }
}

/// All tilings there are.
fn tilings() -> impl Iterator<Item = Tiling> {
    let all = CUTS.into_iter().flat_map(|cut| {
        ROWS.into_iter().flat_map(move |rows| {
            [1, 2].map(|resident| Tiling {
                rows,
                cut,
                resident,
            })
        })
    });
    all.filter(Tiling::fits)
}

/// Everything that [`Product::by_warpgroups`] may launch on this device.
pub(super) fn variants(half_is_f16: bool, device: &Device) -> impl Iterator<Item = Variant> {
    let tilings = tilings().filter(|_| device.has_warpgroups());
    tilings.flat_map(move |tiling| {
        EPILOGUES.map(|epilogue| Variant {
            kernel: Kernel::LINEAR_WGMMA,
            options: tiling.options(half_is_f16, epilogue).to_vec(),
        })
    })
}

impl Product<'_> {
    /// How this kernel is to cut the product; `None` where the one for few rows is faster.
    pub(super) fn warpgroup_tiling(&self, device: &Device) -> Option<Tiling> {
        if self.rows < FROM_ROWS {
            return None;
        }
        Tiling::of(self.rows, self.outputs(), device.multiprocessors())
    }

    /// The same where it is not to be the faster one: as asked for, or as finely as there are too few blocks for.
    pub(super) fn forced_tiling(&self, device: &Device, cut: Option<usize>) -> Tiling {
        let (shape, multiprocessors) = ((self.rows, self.outputs()), device.multiprocessors());
        let with = |number: usize| Tiling::with(CUTS[number], shape, multiprocessors);
        let wanted = || Tiling::of(shape.0, shape.1, multiprocessors);
        cut.map_or_else(|| wanted().unwrap_or_else(|| with(CUTS.len() - 1)), with)
    }

    /// Weights come from memory once for all rows, x once per block of outputs.
    pub(super) fn by_warpgroups(&self, device: &Device, tiling: Tiling) -> Result<(), CudaError> {
        let own_outputs = self.own_outputs(tiling.outputs());
        let (product, tiles) = self.arguments(own_outputs as usize, 1);
        let map = |address, rows, box_rows| {
            TensorMap::of_matrix(address, (rows, self.inputs()), box_rows, self.half_is_f16)
        };
        let mut weights = [TensorMap::zeroed(); 3];
        for (to, p) in weights.iter_mut().zip(self.projections) {
            *to = map(p.weight.address(), p.weight.shape().0, own_outputs)?;
        }
        let args = WgmmaArgs {
            x: map(self.x, self.rows, tiling.block_rows())?,
            weights,
            product,
            padding: [0; 7],
        };
        let options = tiling.options(self.half_is_f16, self.epilogue);
        let launch = LaunchShape {
            grid: (
                (self.rows as u32).div_ceil(tiling.block_rows()),
                tiles * tiling.cut.cluster,
                1,
            ),
            threads: tiling.threads(),
            shared_bytes: tiling.shared_bytes(),
        };
        self.launch(device, (Kernel::LINEAR_WGMMA, &options), launch, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_room_for_its_ring_and_its_results() {
        for tiling in tilings() {
            assert!(tiling.stages() >= 4, "{tiling:?}");
            let bytes = tiling.shared_bytes();
            assert!(bytes * tiling.resident <= RING_BYTES, "{tiling:?}");
            // Gate and up outputs meet where the ring was.
            let results = tiling.block_rows() * (tiling.outputs() + 4) * 4;
            assert!(results <= bytes, "{tiling:?}");
        }
    }

    #[test]
    fn row_groups_are_alike_and_blocks_as_coarse_as_keeps_the_gpu_busy() {
        let of = |rows, outputs| {
            let tiling = Tiling::of(rows, outputs, 132)?;
            let Cut {
                groups, cluster, ..
            } = tiling.cut;
            Some((tiling.block_rows(), groups, cluster, tiling.resident))
        };
        assert_eq!(of(40, 28_672), Some((40, 2, 1, 2)));
        assert_eq!(of(40, 6144), Some((40, 1, 2, 2)));
        assert_eq!(of(160, 6144), Some((80, 1, 2, 2)));
        assert_eq!(of(24, 4096), Some((32, 1, 2, 1)));
        assert_eq!(of(24, 2048), Some((32, 1, 4, 1)));
        assert_eq!(of(24, 512), None);
        // Three groups of 134.
        assert_eq!(of(400, 28_672), Some((160, 2, 1, 1)));
    }
}
