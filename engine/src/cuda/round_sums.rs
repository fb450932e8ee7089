//! [`RoundSums`]: rows of means, kept on the device from one captured step of a round to the next.
//!
//! A session's sums are found again by the [`RoundId`] of its selection. Those of the sessions that went longest without a
//! captured step make room for others; a round whose sums are gone goes on with the steps that follow.

use std::collections::HashMap;
use std::sync::Arc;

use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::Kernel;
use super::memory::DeviceMemory;
use super::recording::LaunchShape;
use crate::row_selection::{Round, RoundId, Spread};

/// Words of a row of means; mirrors `MeanRow` in selection.cu.
const MEAN_WORDS: usize = 8;

/// Bytes of sums to keep; those that a pass uses stay in any case.
const BUDGET: usize = 256 << 20;

/// One session's sums.
struct Sums {
    memory: DeviceMemory,
    context_len: usize,
    /// Rows summed.
    steps: u32,
    rows: usize,
    /// The number of the pass that used them last.
    used: u64,
}

/// The sums of all sessions.
pub(super) struct RoundSums {
    device: Arc<Device>,
    of: HashMap<RoundId, Sums>,
    pass: u64,
    /// Rows of means of the pass at hand.
    rows: usize,
}

impl RoundSums {
    /// None yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            of: HashMap::new(),
            pass: 0,
            rows: 0,
        }
    }

    /// A new pass.
    pub(super) fn begin(&mut self) {
        self.pass += 1;
        self.rows = 0;
    }

    /// Describes the means of one span to the kernels, appending to `words`: `rows` gives their numbers among the mixed rows, each
    /// `length` long.
    pub(super) fn describe(
        &mut self,
        round: Round,
        rows: &[(usize, Spread)],
        length: usize,
        words: &mut Vec<u32>,
    ) -> Result<(), CudaError> {
        if rows.is_empty() {
            return Ok(());
        }
        let stride = round.context_len.next_multiple_of(4);
        self.make_room(rows.len() * stride * 4);
        let sums = self.of.entry(round.id).or_insert_with(|| Sums {
            memory: DeviceMemory::new(&self.device),
            context_len: 0,
            steps: 0,
            rows: 0,
            used: 0,
        });
        let goes_on =
            round.step > 0 && (sums.rows, sums.context_len) == (rows.len(), round.context_len);
        let before = if goes_on { sums.steps } else { 0 };
        sums.memory.grow((rows.len() * stride * 4).max(16))?;
        (sums.rows, sums.context_len) = (rows.len(), round.context_len);
        (sums.steps, sums.used) = (before + 1, self.pass);
        for (index, &(row, spread)) in rows.iter().enumerate() {
            let sum = sums.memory.address() + (index * stride * 4) as u64;
            let mean: [u32; MEAN_WORDS] = [
                sum as u32,
                (sum >> 32) as u32,
                row as u32,
                round.context_len as u32,
                length as u32,
                before,
                spread.share.to_bits(),
                spread.reach,
            ];
            words.extend(mean);
        }
        self.rows += rows.len();
        Ok(())
    }

    /// Forgets the sums that went unused longest until `bytes` more fit.
    fn make_room(&mut self, bytes: usize) {
        let held =
            |of: &HashMap<RoundId, Sums>| of.values().map(|s| s.memory.bytes()).sum::<usize>();
        while held(&self.of) + bytes > BUDGET {
            let oldest = self.of.iter().filter(|(_, sums)| sums.used < self.pass);
            let Some((&id, _)) = oldest.min_by_key(|(_, sums)| sums.used) else {
                return;
            };
            self.of.remove(&id);
        }
    }

    /// Adds the mixed rows to the sums, and puts what is to be selected from in their place; `means` is where the description is.
    pub(super) fn gather(&self, means: u64, rows: u64, stride: usize) -> Result<(), CudaError> {
        if self.rows == 0 {
            return Ok(());
        }
        let row_stride = stride as u32;
        for (kernel, positions) in [(Kernel::ADD_TO_MEANS, 1024), (Kernel::SPREAD_MEANS, 256)] {
            let kernel = self.device.kernel(kernel, &[])?;
            let launch = LaunchShape {
                grid: (row_stride.div_ceil(positions), self.rows as u32, 1),
                threads: 256,
                shared_bytes: 0,
            };
            // SAFETY: the description names rows below the number that memory was made for, and sums made for their contexts.
            unsafe {
                self.device.launch(&kernel, launch, |l| {
                    l.arg(&means).arg(&rows).arg(&row_stride);
                })?;
            }
        }
        Ok(())
    }
}
