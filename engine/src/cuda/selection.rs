//! Masks on the device: top-p, union and granularity, index lists.

use std::sync::Arc;

use cudarc::driver::{DeviceRepr, PushKernelArg};

use super::device::{Device, LaunchShape};
use super::error::CudaError;
use super::kernel_cache::Kernel;
use super::memory::DeviceMemory;

/// Longest row that [`Selector::top_p`] takes.
pub const MAX_ROW: usize = 32_768;

/// Mirrors `TopPArgs` in selection.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct TopPArgs {
    rows: u64,
    selected: u64,
    thresholds: u64,
    num_rows: u32,
    length: u32,
    stride: u32,
    p: f32,
}

// SAFETY: plain numbers in the kernel's layout.
unsafe impl DeviceRepr for TopPArgs {}

/// Selections and lists of one device, with their memory.
pub struct Selector {
    device: Arc<Device>,
    /// `[rows, words]`.
    selected: DeviceMemory,
    thresholds: DeviceMemory,
    /// `[sources, words]`.
    masks: DeviceMemory,
    lists: DeviceMemory,
    lengths: DeviceMemory,
}

/// How rows lie in memory.
#[derive(Debug, Clone, Copy)]
pub struct RowShape {
    /// Rows.
    pub rows: usize,
    /// Entries per row.
    pub length: usize,
    /// Entries from one row to the next; a multiple of 4.
    pub stride: usize,
}

/// What is kept beside a selection.
#[derive(Debug, Clone, Copy)]
pub struct ListShape {
    /// Lists are below this position.
    pub cached: usize,
    /// First positions always kept.
    pub sinks: usize,
    /// Positions from here on are always kept.
    pub window_start: usize,
}

impl Selector {
    /// A selector without memory yet.
    pub fn new(device: &Arc<Device>) -> Self {
        let memory = || DeviceMemory::new(device);
        Self {
            device: Arc::clone(device),
            selected: memory(),
            thresholds: memory(),
            masks: memory(),
            lists: memory(),
            lengths: memory(),
        }
    }

    /// Selects in every row of probabilities the entries at or above the largest threshold whose mass reaches `p` of the row's.
    /// Masses are fixed-point, in units of 2^-31.
    ///
    /// # Errors
    /// [`CudaError`].
    ///
    /// # Panics
    /// For rows longer than [`MAX_ROW`], or `rows` smaller than `shape`.
    pub fn top_p(&mut self, rows: &DeviceMemory, shape: RowShape, p: f32) -> Result<(), CudaError> {
        assert!(
            shape.length <= MAX_ROW
                && shape.length <= shape.stride
                && shape.stride.is_multiple_of(4),
            "{shape:?}"
        );
        assert!(
            rows.bytes() >= shape.rows * shape.stride * 4,
            "rows of {shape:?}"
        );
        let words = shape.length.div_ceil(32);
        self.selected.reserve(shape.rows * words * 4)?;
        self.thresholds.reserve(shape.rows * 4)?;
        let (threads, values): (u32, u32) = match shape.length {
            0..=4096 => (256, 16),
            4097..=8192 => (512, 16),
            8193..=16384 => (512, 32),
            _ => (1024, 32),
        };
        let kernel = self
            .device
            .kernel(Kernel::TOP_P, &[("THREADS", threads), ("VALUES", values)])?;
        let args = TopPArgs {
            rows: rows.address(),
            selected: self.selected.address(),
            thresholds: self.thresholds.address(),
            num_rows: shape.rows as u32,
            length: shape.length as u32,
            stride: shape.stride as u32,
            p,
        };
        // As many blocks as are resident at a time; each takes rows in turn.
        let resident = self.device.multiprocessors() * (1024 / threads);
        let launch = LaunchShape {
            grid: ((shape.rows as u32).min(resident), 1, 1),
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

    /// Unites the last selection over its steps, rows being `[steps, sources]`, and coarsens it: packed masks, `[sources, words]`.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn unite(
        &mut self,
        (steps, sources): (usize, usize),
        length: usize,
        granularity: usize,
    ) -> Result<(), CudaError> {
        let words = length.div_ceil(32);
        assert!(
            self.selected.bytes() >= steps * sources * words * 4 && granularity > 0,
            "a selection of that shape"
        );
        self.masks.reserve(sources * words * 4)?;
        let kernel = self.device.kernel(Kernel::UNITE_STEPS, &[])?;
        let (selected, masks) = (self.selected.address(), self.masks.address());
        let (steps, word_count, length, granularity) = (
            steps as u32,
            words as u32,
            length as u32,
            granularity as u32,
        );
        let launch = LaunchShape {
            grid: (word_count.div_ceil(128), sources as u32, 1),
            threads: 128,
            shared_bytes: 0,
        };
        // SAFETY: sizes were checked or made above.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&selected)
                    .arg(&masks)
                    .arg(&steps)
                    .arg(&word_count)
                    .arg(&length)
                    .arg(&granularity);
            })
        }
    }

    /// Turns the masks into index lists with sinks and window.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn lists(
        &mut self,
        sources: usize,
        length: usize,
        shape: ListShape,
    ) -> Result<(), CudaError> {
        let words = length.div_ceil(32) as u32;
        assert!(
            self.masks.bytes() >= sources * words as usize * 4,
            "masks of that shape"
        );
        self.lists.reserve(sources * shape.cached.max(1) * 4)?;
        self.lengths.reserve(sources * 4)?;
        let kernel = self.device.kernel(Kernel::BUILD_LISTS, &[])?;
        let (masks, lists, lengths) = (
            self.masks.address(),
            self.lists.address(),
            self.lengths.address(),
        );
        let (cached, sinks, window) = (
            shape.cached as u32,
            shape.sinks as u32,
            shape.window_start as u32,
        );
        let launch = LaunchShape {
            grid: (sources as u32, 1, 1),
            threads: 1024,
            shared_bytes: 0,
        };
        // SAFETY: a list has at most `cached` positions, which is its stride.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&masks)
                    .arg(&lists)
                    .arg(&lengths)
                    .arg(&words)
                    .arg(&cached)
                    .arg(&sinks)
                    .arg(&window)
                    .arg(&cached);
            })
        }
    }

    /// Selected bits: `[rows, words]`.
    pub fn selected(&self) -> &DeviceMemory {
        &self.selected
    }

    /// Packed masks: `[sources, words]`, the bytes that go to the host.
    pub fn masks(&self) -> &DeviceMemory {
        &self.masks
    }

    /// Index lists, `[sources, cached]`, and their lengths.
    pub fn index_lists(&self) -> (&DeviceMemory, &DeviceMemory) {
        (&self.lists, &self.lengths)
    }
}
