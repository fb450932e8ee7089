//! [`DeviceBatch`]: a pass described to the kernels, uploaded in one copy.
//!
//! One block of 32-bit words holds every section: tokens, positions, which span a row belongs to, rows that get logits, spans,
//! block tables, index lists, and the units of decode attention: (span, chunk of keys), those of a span in a row.

use std::sync::Arc;

use super::device::Device;
use super::error::CudaError;
use super::memory::DeviceMemory;
use crate::backend::Pass;

/// "None" to the kernels.
pub(super) const NONE: u32 = u32::MAX;

/// Words of a span; mirrors `Span` in prelude.cuh.
const SPAN_WORDS: usize = 6;

/// Where a section begins, in words.
#[derive(Debug, Clone, Copy, Default)]
struct Sections {
    tokens: usize,
    positions: usize,
    row_spans: usize,
    logit_rows: usize,
    spans: usize,
    block_tables: usize,
    list_numbers: usize,
    list_starts: usize,
    list_positions: usize,
    units: usize,
}

/// The description of one pass on a device.
pub(super) struct DeviceBatch {
    memory: DeviceMemory,
    words: Vec<u32>,
    at: Sections,
    num_units: usize,
    num_spans: usize,
    max_span_rows: usize,
}

impl DeviceBatch {
    /// Nothing yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            memory: DeviceMemory::new(device),
            words: Vec::new(),
            at: Sections::default(),
            num_units: 0,
            num_spans: 0,
            max_span_rows: 0,
        }
    }

    /// Describes `pass`; units have `chunk` keys. `captures` gives the capturing spans their numbers.
    pub(super) fn upload(
        &mut self,
        pass: &Pass<'_>,
        chunk: usize,
        captures: &[usize],
    ) -> Result<(), CudaError> {
        let words = &mut self.words;
        words.clear();
        // Sections begin on 16 bytes.
        fn section(words: &mut Vec<u32>) -> usize {
            words.resize(words.len().next_multiple_of(4), 0);
            words.len()
        }
        self.at.tokens = section(words);
        words.extend_from_slice(&pass.tokens);
        self.at.positions = section(words);
        words.extend_from_slice(&pass.positions);
        self.at.row_spans = section(words);
        for (index, span) in pass.spans.iter().enumerate() {
            words.extend(span.rows.clone().map(|_| index as u32));
        }
        self.at.logit_rows = section(words);
        words.extend(pass.logit_rows.iter().map(|&row| row as u32));

        self.at.spans = section(words);
        let (mut blocks, mut numbers) = (0, 0);
        for (index, span) in pass.spans.iter().enumerate() {
            let capture = captures
                .iter()
                .position(|&c| c == index)
                .map_or(NONE, |c| c as u32);
            let lists = if span.lists.is_some() {
                numbers as u32
            } else {
                NONE
            };
            words.extend([
                span.rows.start as u32,
                span.rows.len() as u32,
                span.past as u32,
                blocks as u32,
                lists,
                capture,
            ]);
            blocks += span.blocks.len();
            numbers += span.lists.map_or(0, |l| l.of_head.len());
        }
        debug_assert_eq!(words.len() - self.at.spans, SPAN_WORDS * pass.spans.len());
        self.at.block_tables = section(words);
        for span in &pass.spans {
            words.extend_from_slice(span.blocks);
        }
        let lists = || pass.spans.iter().filter_map(|s| s.lists);
        self.at.list_numbers = section(words);
        let mut first = 0;
        for l in lists() {
            words.extend(l.of_head.iter().map(|n| first + n));
            first += l.lists.len() as u32;
        }
        self.at.list_starts = section(words);
        let mut start = 0u32;
        words.push(start);
        for list in lists().flat_map(|l| &l.lists) {
            start += list.len() as u32;
            words.push(start);
        }
        self.at.list_positions = section(words);
        for list in lists().flat_map(|l| &l.lists) {
            words.extend_from_slice(list);
        }
        self.at.units = section(words);
        self.num_spans = pass.spans.len();
        self.max_span_rows = 0;
        for (index, span) in pass.spans.iter().enumerate() {
            // The longest list in use: heads with shorter ones leave their last units unused.
            let cached = match span.lists {
                None => span.past,
                Some(l) => l
                    .of_head
                    .iter()
                    .map(|&n| l.lists[n as usize].len())
                    .max()
                    .unwrap_or(0),
            };
            let chunks = (cached + span.rows.len()).div_ceil(chunk);
            words.extend((0..chunks as u32).flat_map(|c| [index as u32, c]));
            self.max_span_rows = self.max_span_rows.max(span.rows.len());
        }
        self.num_units = (words.len() - self.at.units) / 2;
        let bytes = size_of_val(words.as_slice());
        if bytes > self.memory.bytes() {
            self.memory.reserve(bytes.next_power_of_two())?;
        }
        self.memory.write(0, &self.words)
    }

    /// Units of decode attention.
    pub(super) fn num_units(&self) -> usize {
        self.num_units
    }

    /// Spans.
    pub(super) fn num_spans(&self) -> usize {
        self.num_spans
    }

    /// Most rows of a span.
    pub(super) fn max_span_rows(&self) -> usize {
        self.max_span_rows
    }

    fn address(&self, words: usize) -> u64 {
        self.memory.address() + 4 * words as u64
    }

    pub(super) fn tokens(&self) -> u64 {
        self.address(self.at.tokens)
    }

    pub(super) fn positions(&self) -> u64 {
        self.address(self.at.positions)
    }

    pub(super) fn row_spans(&self) -> u64 {
        self.address(self.at.row_spans)
    }

    pub(super) fn logit_rows(&self) -> u64 {
        self.address(self.at.logit_rows)
    }

    pub(super) fn spans(&self) -> u64 {
        self.address(self.at.spans)
    }

    pub(super) fn block_tables(&self) -> u64 {
        self.address(self.at.block_tables)
    }

    pub(super) fn list_numbers(&self) -> u64 {
        self.address(self.at.list_numbers)
    }

    pub(super) fn list_starts(&self) -> u64 {
        self.address(self.at.list_starts)
    }

    pub(super) fn list_positions(&self) -> u64 {
        self.address(self.at.list_positions)
    }

    pub(super) fn units(&self) -> u64 {
        self.address(self.at.units)
    }
}
