//! The streaming kernel for many rows: how a product is cut for it.
//!
//! Its bits are those of the kernel for few rows, so that which of them serves a batch is a matter of speed alone.

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::linear::{EPILOGUES, Product, epilogue_number};
use super::recording::LaunchShape;
use crate::backend::Epilogue;

/// Rows from which this kernel is the faster one, for products of many outputs.
const WIDE_FROM: usize = 33;

/// Warps of a block: those that share its rows, and those that share its outputs.
const OUTPUT_WARPS: u32 = 4;
const ROW_WARPS: u32 = 2;
/// Outputs of a block, of all matrices.
const OUTPUTS: u32 = 32 * OUTPUT_WARPS;
/// Eights of rows that a warp may take. With more, one block would fill a multiprocessor, and no other would work while its warps
/// wait for each other.
const COLUMN_TILES: [u32; 2] = [3, 4];
/// Most rows of a block.
const ROWS_MOST: u32 = ROW_WARPS * 8 * COLUMN_TILES[1];
/// Shared memory of a block's ring: two blocks share a multiprocessor.
const RING_BYTES: u32 = 100 << 10;

/// How a product is cut: eights of rows per warp.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling(u32);

impl Tiling {
    /// For so many rows, in groups of about the same size.
    fn of(rows: u32) -> Self {
        let of_group = rows.div_ceil(rows.div_ceil(ROWS_MOST).max(1));
        let fits = |&tiles: &u32| of_group <= ROW_WARPS * 8 * tiles;
        Self(
            COLUMN_TILES
                .into_iter()
                .find(fits)
                .unwrap_or(COLUMN_TILES[1]),
        )
    }

    /// Rows of a block.
    fn rows(self) -> u32 {
        ROW_WARPS * 8 * self.0
    }

    fn stage_bytes(self) -> u32 {
        (OUTPUTS + self.rows()) * 128
    }

    fn stages(self) -> u32 {
        RING_BYTES / self.stage_bytes()
    }

    fn options(self, half_is_f16: bool, epilogue: Epilogue) -> [(&'static str, u32); 5] {
        [
            ("HALF_IS_F16", u32::from(half_is_f16)),
            ("COLUMN_TILES", self.0),
            ("OUTPUT_WARPS", OUTPUT_WARPS),
            ("STAGES", self.stages()),
            ("EPILOGUE", epilogue_number(epilogue)),
        ]
    }
}

/// Everything that [`Product::wide`] may launch.
pub(super) fn variants(half_is_f16: bool) -> impl Iterator<Item = Variant> {
    COLUMN_TILES.into_iter().flat_map(move |column_tiles| {
        EPILOGUES.map(|epilogue| Variant {
            kernel: Kernel::LINEAR_WIDE,
            options: Tiling(column_tiles).options(half_is_f16, epilogue).to_vec(),
        })
    })
}

impl Product<'_> {
    /// Whether this kernel is the faster one. It needs blocks enough for all multiprocessors: with fewer outputs the kernel for few
    /// rows, which has finer blocks, is faster for any number of rows.
    pub(super) fn gains_by_wide(&self, device: &Device) -> bool {
        if self.rows < WIDE_FROM {
            return false;
        }
        let outputs: usize = self.projections.iter().map(|p| p.weight.shape().0).sum();
        let groups = (self.rows as u32).div_ceil(Tiling::of(self.rows as u32).rows());
        outputs as u32 / OUTPUTS * groups >= device.multiprocessors()
    }

    /// Weights come from memory once for all rows, x once per block of outputs.
    pub(super) fn wide(&self, device: &Device) -> Result<(), CudaError> {
        let tiling = Tiling::of(self.rows as u32);
        let gated = self.epilogue == Epilogue::SwiGlu;
        let own_outputs = if gated { OUTPUTS / 2 } else { OUTPUTS };
        let (args, tiles) = self.arguments(own_outputs as usize, 1);
        let options = tiling.options(self.half_is_f16, self.epilogue);
        let kernel = device.kernel(Kernel::LINEAR_WIDE, &options)?;
        let launch = LaunchShape {
            grid: ((self.rows as u32).div_ceil(tiling.rows()), tiles, 1),
            threads: 32 * OUTPUT_WARPS * ROW_WARPS,
            shared_bytes: tiling.stages() * tiling.stage_bytes(),
        };
        // SAFETY: weights have the shapes given, x and out hold `rows` rows of them.
        unsafe {
            device.launch(&kernel, launch, |l| {
                l.arg(&args);
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_room_for_its_ring_and_its_results() {
        for column_tiles in COLUMN_TILES {
            let tiling = Tiling(column_tiles);
            assert!(tiling.stages() >= 3, "{tiling:?}");
            let results = tiling.rows() * (OUTPUTS + 4) * 4;
            assert!(results <= tiling.stages() * tiling.stage_bytes());
        }
    }

    #[test]
    fn groups_of_rows_are_alike() {
        let rows = |rows| Tiling::of(rows).rows();
        assert_eq!([1, 40, 48, 49, 64].map(rows), [48, 48, 48, 64, 64]);
        // Two groups of 48, three of 54.
        assert_eq!([96, 160].map(rows), [48, 64]);
    }
}
