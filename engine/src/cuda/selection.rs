//! Top-p selections of rows on the device.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::bucket::bucket;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::memory::DeviceMemory;
use super::recording::LaunchShape;

/// Rows' strides and words are multiples of so many entries, and of [`bucket`]s: few passes differ in them.
pub(super) const ROW_STEP: usize = 256;

/// Longest row that [`Selector::top_p`] takes.
pub const MAX_ROW: usize = 32_768;

/// Threads, and entries of each, that take a row, by length.
const TILINGS: [(u32, u32); 4] = [(256, 16), (512, 16), (512, 32), (1024, 32)];

fn options(threads: u32, values: u32) -> [(&'static str, u32); 2] {
    [("THREADS", threads), ("VALUES", values)]
}

/// What selecting in a forward may launch.
pub(super) fn variants() -> impl Iterator<Item = Variant> {
    let plain = [Kernel::MIX_ROWS, Kernel::ADD_TO_MEANS, Kernel::SPREAD_MEANS];
    let plain = plain.into_iter().map(|kernel| Variant {
        kernel,
        options: Vec::new(),
    });
    let top_p = TILINGS.into_iter().map(|(threads, values)| Variant {
        kernel: Kernel::TOP_P,
        options: options(threads, values).to_vec(),
    });
    plain.chain(top_p)
}

/// Mirrors `TopPArgs` in selection.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TopPArgs {
    rows: u64,
    specs: u64,
    selected: u64,
    thresholds: u64,
    num_rows: u32,
    stride: u32,
    words: u32,
    unused: u32,
}

/// Selections of one device, with their memory.
pub struct Selector {
    device: Arc<Device>,
    /// What the device was told of the rows: two words each.
    specs: DeviceMemory,
    described: Vec<RowSpec>,
    /// Words per row.
    words: usize,
    /// `[rows, words]`.
    selected: DeviceMemory,
    thresholds: DeviceMemory,
}

/// A row to select from: its entries, and the share of its mass to reach. Mirrors `RowSpec` in selection.cu.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowSpec {
    /// Entries.
    pub length: usize,
    /// Share of the row's mass.
    pub p: f32,
}

impl Selector {
    /// A selector without memory yet.
    pub fn new(device: &Arc<Device>) -> Self {
        let memory = || DeviceMemory::new(device);
        Self {
            device: Arc::clone(device),
            specs: memory(),
            described: Vec::new(),
            words: 0,
            selected: memory(),
            thresholds: memory(),
        }
    }

    /// Selects in every row of probabilities the entries at or above the largest threshold whose mass reaches the row's p.
    /// Masses are fixed-point, in units of 2^-31; a row's total is at most 1. Rows begin `stride` entries apart.
    ///
    /// # Errors
    /// [`CudaError`].
    ///
    /// # Panics
    /// For rows longer than [`MAX_ROW`] or `stride`, a stride that is no multiple of 4, or `rows` of less memory.
    pub fn top_p(
        &mut self,
        rows: &DeviceMemory,
        stride: usize,
        specs: &[RowSpec],
    ) -> Result<(), CudaError> {
        let longest = specs.iter().map(|spec| spec.length).max().unwrap_or(0);
        assert!(
            longest <= MAX_ROW.min(stride) && stride.is_multiple_of(4),
            "rows of up to {longest} in a stride of {stride}"
        );
        assert!(
            rows.bytes() >= specs.len() * stride * 4,
            "{} rows of {stride}",
            specs.len()
        );
        self.describe(specs)?;
        // A multiple of 8: the kernel stores four words at a time, the host takes them for 64-bit ones.
        self.words = bucket(longest, ROW_STEP) / 32;
        self.selected.grow(specs.len() * self.words * 4)?;
        self.thresholds.grow(specs.len() * 4)?;
        let tiling = TILINGS.iter().find(|t| longest <= (t.0 * t.1) as usize);
        let &(threads, values) = tiling.expect("the last one takes the longest row");
        let kernel = self
            .device
            .kernel(Kernel::TOP_P, &options(threads, values))?;
        let args = TopPArgs {
            rows: rows.address(),
            specs: self.specs.address(),
            selected: self.selected.address(),
            thresholds: self.thresholds.address(),
            num_rows: specs.len() as u32,
            stride: stride as u32,
            words: self.words as u32,
            unused: 0,
        };
        // As many blocks as are resident at a time; each takes rows in turn.
        let resident = self.device.multiprocessors() * (1024 / threads);
        let launch = LaunchShape {
            grid: ((specs.len() as u32).min(resident), 1, 1),
            threads,
            shared_bytes: threads * values * 4,
        };
        // SAFETY: sizes were checked or made above.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&args);
            })
        }
    }

    /// Tells the device of the rows, unless they are those it knows: [`Selector::top_p`] does it too, but within a pass it would
    /// interrupt it.
    pub(super) fn describe(&mut self, specs: &[RowSpec]) -> Result<(), CudaError> {
        if self.described == specs {
            return Ok(());
        }
        let words: Vec<u32> = specs
            .iter()
            .flat_map(|spec| [spec.length as u32, spec.p.to_bits()])
            .collect();
        self.described.clear();
        self.specs.grow(words.len() * 4)?;
        self.specs.write(0, &words)?;
        self.described.extend_from_slice(specs);
        Ok(())
    }

    /// 32-bit words of a row of the last selection; even.
    pub fn words(&self) -> usize {
        self.words
    }

    /// Selected bits: `[rows, words]`, of which those past a row's end are 0.
    pub fn selected(&self) -> &DeviceMemory {
        &self.selected
    }
}
