//! The streaming kernel for many rows on GPUs that cannot run the one of warpgroup instructions: how a product is cut for it.
//!
//! Its bits are those of the kernel for few rows, so that which of them serves a batch is a matter of speed alone.

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::linear::{EPILOGUES, Product, epilogue_number};
use super::recording::LaunchShape;
use crate::backend::Epilogue;

/// Rows from which this kernel is the faster one, where there are blocks enough.
const WIDE_FROM: usize = 17;
/// Fewest blocks for which it is.
const BLOCKS_LEAST: u32 = 96;

/// Warps of a group that share its outputs.
const ROW_WARPS: u32 = 2;
/// Eights of rows that a warp may take. With more, one block would fill a multiprocessor, and no other would work while its warps
/// wait for each other.
const COLUMN_TILES: [u32; 3] = [2, 3, 4];
/// Most rows of a block.
const ROWS_MOST: u32 = ROW_WARPS * 8 * COLUMN_TILES[2];
/// Shared memory of a multiprocessor for rings.
const RING_BYTES: u32 = 200 << 10;

/// How a block's warps share its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// All walk through the inputs together.
    Whole,
    /// Fewer outputs, and groups of warps that share the inputs.
    Split,
}

impl Sharing {
    /// All ways.
    const ALL: [Self; 2] = [Self::Whole, Self::Split];
}

/// How a product is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Eights of rows per warp.
    column_tiles: u32,
    sharing: Sharing,
}

impl Tiling {
    /// For so many rows, in row groups of about the same size.
    pub(super) fn of(rows: usize, sharing: Sharing) -> Self {
        let rows = rows as u32;
        let of_group = rows.div_ceil(rows.div_ceil(ROWS_MOST).max(1));
        let fits = |&tiles: &u32| of_group <= ROW_WARPS * 8 * tiles;
        let column_tiles = COLUMN_TILES.into_iter().find(fits);
        Self {
            column_tiles: column_tiles.unwrap_or(COLUMN_TILES[2]),
            sharing,
        }
    }

    /// Thirty-twos of outputs per block.
    fn output_warps(self) -> u32 {
        if self.sharing == Sharing::Whole { 4 } else { 2 }
    }

    /// Groups of warps.
    fn groups(self) -> u32 {
        if self.sharing == Sharing::Whole { 1 } else { 4 }
    }

    /// Rows of a block.
    fn rows(self) -> u32 {
        ROW_WARPS * 8 * self.column_tiles
    }

    /// Outputs of a block, of all matrices.
    fn outputs(self) -> u32 {
        32 * self.output_warps()
    }

    /// Blocks of a product of so many rows and outputs.
    fn blocks(self, rows: usize, outputs: usize) -> u32 {
        (outputs as u32).div_ceil(self.outputs()) * (rows as u32).div_ceil(self.rows())
    }

    fn stage_bytes(self) -> u32 {
        (self.outputs() + self.rows()) * 128
    }

    /// Stages of a group's ring: two blocks of one group share a multiprocessor, one of four has it alone.
    fn stages(self) -> u32 {
        let rings = if self.sharing == Sharing::Whole { 2 } else { 4 };
        RING_BYTES / rings / self.stage_bytes()
    }

    /// Shared memory of a block.
    fn shared_bytes(self) -> u32 {
        self.groups() * self.stages() * self.stage_bytes()
    }

    fn options(self, half_is_f16: bool, epilogue: Epilogue) -> [(&'static str, u32); 6] {
        [
            ("HALF_IS_F16", u32::from(half_is_f16)),
            ("COLUMN_TILES", self.column_tiles),
            ("OUTPUT_WARPS", self.output_warps()),
            ("GROUPS", self.groups()),
            ("STAGES", self.stages()),
            ("EPILOGUE", epilogue_number(epilogue)),
        ]
    }
}

/// Everything that [`Product::wide`] may launch on this device.
pub(super) fn variants(half_is_f16: bool, device: &Device) -> impl Iterator<Item = Variant> {
    let needed = !device.has_warpgroups();
    let sizes = COLUMN_TILES.into_iter().filter(move |_| needed);
    let tilings = sizes.flat_map(|column_tiles| {
        Sharing::ALL.map(|sharing| Tiling {
            column_tiles,
            sharing,
        })
    });
    tilings.flat_map(move |tiling| {
        EPILOGUES.map(|epilogue| Variant {
            kernel: Kernel::LINEAR_WIDE,
            options: tiling.options(half_is_f16, epilogue).to_vec(),
        })
    })
}

impl Product<'_> {
    /// How this kernel is to cut the product; `None` where the one for few rows is faster.
    pub(super) fn wide_tiling(&self, device: &Device) -> Option<Tiling> {
        if self.rows < WIDE_FROM {
            return None;
        }
        let outputs = self.outputs();
        let tiling = |sharing| Tiling::of(self.rows, sharing);
        let blocks = |sharing| tiling(sharing).blocks(self.rows, outputs);
        // Whole blocks where they keep all multiprocessors busy; finer ones where those are not too few.
        if blocks(Sharing::Whole) * 2 >= device.multiprocessors() * 3 {
            Some(tiling(Sharing::Whole))
        } else {
            let enough = blocks(Sharing::Split) >= BLOCKS_LEAST;
            enough.then(|| tiling(Sharing::Split))
        }
    }

    /// Weights come from memory once for all rows, x once per block of outputs.
    pub(super) fn wide(&self, device: &Device, tiling: Tiling) -> Result<(), CudaError> {
        let own_outputs = self.own_outputs(tiling.outputs());
        let (args, tiles) = self.arguments(own_outputs as usize, 1);
        let options = tiling.options(self.half_is_f16, self.epilogue);
        let launch = LaunchShape {
            grid: ((self.rows as u32).div_ceil(tiling.rows()), tiles, 1),
            threads: 32 * ROW_WARPS * tiling.output_warps() * tiling.groups(),
            shared_bytes: tiling.shared_bytes(),
        };
        self.launch(device, (Kernel::LINEAR_WIDE, &options), launch, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_room_for_its_rings_and_its_results() {
        for rows in [32, 48, 64] {
            for sharing in Sharing::ALL {
                let tiling = Tiling::of(rows, sharing);
                assert!(tiling.stages() >= 3, "{tiling:?}");
                let parts = if sharing == Sharing::Whole { 1 } else { 8 };
                let results = parts * tiling.rows() * (tiling.outputs() + 4) * 4;
                assert!(results <= tiling.shared_bytes(), "{tiling:?}");
            }
        }
    }

    #[test]
    fn row_groups_are_alike() {
        let rows = |rows| Tiling::of(rows, Sharing::Whole).rows();
        assert_eq!([1, 40, 48, 49, 64].map(rows), [32, 48, 48, 64, 64]);
        // Two of 48, three of 54.
        assert_eq!([96, 160].map(rows), [48, 64]);
        assert_eq!(Tiling::of(160, Sharing::Split).blocks(160, 4096), 3 * 64);
    }
}
