//! [`DeviceBatch`]: a pass described to the kernels, uploaded in one copy.
//!
//! One block of 32-bit words holds every section: tokens, positions, which span a row belongs to, rows that get logits, spans,
//! block tables, index lists, and the units of decode attention: chunks of keys, the largest first, so that none of them is waited
//! for in the end. Lists cross as bitmaps; a kernel expands them to places in the cache, once, which spares every block of every
//! layer the look-up.
//!
//! Sections whose sizes follow from the pass's shape come first. Those that grow with the context come last and begin where room for
//! more ends, so that the next pass of the same sessions has its sections where this one has them.

use std::sync::Arc;

use super::bucket::bucket;
use super::chunks::Chunks;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::{Kernel, Variant};
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;
use super::recording::LaunchShape;
use crate::attention::{SpanList, SpanLists};
use crate::backend::{Pass, Span};
use crate::crew::Crew;

/// "None" to the kernels.
pub(super) const NONE: u32 = u32::MAX;

/// Words of a span; mirrors `Span` in prelude.cuh.
const SPAN_WORDS: usize = 4;
/// Words of a unit; mirrors `Unit` in prelude.cuh.
const UNIT_WORDS: usize = 8;
/// Words of a list; mirrors `List` in lists.cu.
const LIST_WORDS: usize = 4;

/// Threads per list of the kernel that expands them; mirrors `THREADS` in lists.cu.
const EXPAND_THREADS: u32 = 256;

/// The kernel that a batch may launch.
pub(super) fn variants() -> [Variant; 1] {
    [Variant {
        kernel: Kernel::EXPAND_LISTS,
        options: Vec::new(),
    }]
}

/// A unit whose blocks have nothing to do.
const PADDING_UNIT: [u32; UNIT_WORDS] = [NONE, 0, 0, 0, 0, 0, 0, 0];
/// Spans that capture have numbers below this.
const NO_CAPTURE: u32 = 0xffff;
/// Block tables get room in steps of so many blocks.
const TABLE_STEP: usize = 64;

/// Where a section begins, in words.
#[derive(Debug, Clone, Copy, Default)]
struct Sections {
    tokens: usize,
    positions: usize,
    row_spans: usize,
    logit_rows: usize,
    spans: usize,
    block_tables: usize,
    cut_spans: usize,
    list_ranges: usize,
    lists: usize,
    bitmaps: usize,
    units: usize,
}

/// A span as its units see it.
struct Cut {
    /// Keys of its longest list: heads with shorter ones leave their last units unused.
    keys: usize,
    /// What all its units say, but for their chunk.
    words: [u32; UNIT_WORDS],
}

impl Cut {
    fn unit(&self, chunk: usize) -> [u32; UNIT_WORDS] {
        let mut words = self.words;
        words[1] |= chunk as u32;
        words
    }
}

/// A list's bits in the kernels' words: low halves first, as on every host that a GPU is in.
fn bitmap_of<'a>(list: &SpanList<'a>) -> &'a [u32] {
    bytemuck::cast_slice(list.set().words())
}

/// The spans of a pass. `captures` gives the capturing ones their numbers.
fn cut_spans(pass: &Pass<'_>, chunks: Chunks, captures: &[usize]) -> Vec<Cut> {
    let (mut blocks, mut ranges, mut places) = (0, 0, 0);
    let cut = |(index, span): (usize, &Span<'_>)| {
        let (lists, cached) = match &span.lists {
            None => (NONE, span.past),
            Some(lists) => (ranges as u32, lists.longest()),
        };
        let keys = cached + span.rows.len();
        let capture = captures.iter().position(|&c| c == index);
        let words = [
            index as u32,
            capture.map_or(NO_CAPTURE, |c| c as u32) << 16,
            span.rows.start as u32,
            span.rows.len() as u32,
            span.past as u32,
            blocks as u32,
            lists,
            places as u32,
        ];
        blocks += span.blocks.len();
        ranges += span.lists.as_ref().map_or(0, |l| l.of_head().len());
        places += chunks.count(keys);
        Cut { keys, words }
    };
    pass.spans.iter().enumerate().map(cut).collect()
}

/// The description of one pass on a device.
pub(super) struct DeviceBatch {
    memory: DeviceMemory,
    /// The lists' entries: places in the cache, `block * BLOCK_TOKENS + offset`.
    list_slots: DeviceMemory,
    host: PinnedMemory,
    words: Vec<u32>,
    at: Sections,
    num_lists: usize,
    num_units: usize,
    chunks: Chunks,
    has_pieces: bool,
    num_spans: usize,
    num_rows: usize,
    max_span_rows: usize,
}

impl DeviceBatch {
    /// Nothing yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            memory: DeviceMemory::new(device),
            list_slots: DeviceMemory::new(device),
            host: device.pinned(),
            words: Vec::new(),
            at: Sections::default(),
            num_lists: 0,
            num_units: 0,
            chunks: Chunks::up_to(1),
            has_pieces: false,
            num_spans: 0,
            num_rows: 0,
            max_span_rows: 0,
        }
    }

    /// Describes `pass`, whose keys are cut into `chunks`.
    pub(super) fn upload(
        &mut self,
        device: &Device,
        pass: &Pass<'_>,
        chunks: Chunks,
        crew: &mut Crew,
    ) -> Result<(), CudaError> {
        let words = &mut self.words;
        words.clear();
        self.chunks = chunks;
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
        let mut blocks = 0;
        for span in &pass.spans {
            words.extend([
                span.rows.start as u32,
                span.rows.len() as u32,
                span.past as u32,
                blocks as u32,
            ]);
            blocks += span.blocks.len();
        }
        debug_assert_eq!(words.len() - self.at.spans, SPAN_WORDS * pass.spans.len());
        self.at.cut_spans = section(words);
        let cuts = cut_spans(pass, chunks, &pass.captures);
        words.extend(cuts.iter().flat_map(|cut| cut.words));
        self.has_pieces = cuts.iter().any(|cut| chunks.count(cut.keys) > 1);
        self.at.list_ranges = section(words);
        let mut first = 0;
        for lists in pass.spans.iter().filter_map(|s| s.lists.as_ref()) {
            let starts: Vec<usize> = lists
                .lists()
                .iter()
                .scan(first, |start, list| {
                    let own = *start;
                    *start += list.len();
                    Some(own)
                })
                .collect();
            for &number in lists.of_head() {
                let number = number as usize;
                words.extend([starts[number] as u32, lists.lists()[number].len() as u32]);
            }
            first += lists.lists().iter().map(SpanList::len).sum::<usize>();
        }
        self.at.units = section(words);
        self.num_spans = pass.spans.len();
        self.num_rows = pass.tokens.len();
        self.max_span_rows = pass.spans.iter().map(|s| s.rows.len()).max().unwrap_or(0);
        for size in (0..Chunks::SIZES).rev() {
            for cut in &cuts {
                for chunk in chunks.of_size(size, cut.keys) {
                    words.extend(cut.unit(chunk));
                }
            }
        }
        self.num_units = bucket((words.len() - self.at.units) / UNIT_WORDS, 1);
        while words.len() < self.at.units + self.num_units * UNIT_WORDS {
            words.extend(PADDING_UNIT);
        }
        self.at.block_tables = section(words);
        for span in &pass.spans {
            words.extend_from_slice(span.blocks);
        }
        debug_assert_eq!(words.len() - self.at.block_tables, blocks);
        words.resize(self.at.block_tables + bucket(blocks, TABLE_STEP), 0);
        self.list_slots.grow(first * 4)?;
        self.at.lists = section(words);
        let (mut bitmap, mut slot, mut blocks) = (0, 0, 0);
        for span in &pass.spans {
            for list in span.lists.iter().flat_map(SpanLists::lists) {
                let length = bitmap_of(list).len();
                words.extend([bitmap, length, slot, blocks].map(|x| x as u32));
                bitmap += length;
                slot += list.len();
            }
            blocks += span.blocks.len();
        }
        self.num_lists = (words.len() - self.at.lists) / LIST_WORDS;
        self.at.bitmaps = section(words);
        // Megabytes where many sessions read by lists: from the sets to pinned memory at once, by several threads.
        let staged = self.host.elements(self.at.bitmaps + bitmap)?;
        let (before, mut bitmaps) = staged.split_at_mut(self.at.bitmaps);
        before.copy_from_slice(words);
        let mut parts = Vec::new();
        for lists in pass.spans.iter().filter_map(|span| span.lists.as_ref()) {
            let own = lists.lists().iter().map(|list| bitmap_of(list).len()).sum();
            let (to, rest) = bitmaps.split_at_mut(own);
            parts.push((lists, to));
            bitmaps = rest;
        }
        crew.for_each(&mut parts, |(lists, to)| {
            let mut to = &mut to[..];
            for own in lists.lists().iter().map(bitmap_of) {
                let (here, rest) = to.split_at_mut(own.len());
                here.copy_from_slice(own);
                to = rest;
            }
        });
        self.memory.grow(size_of_val(&*staged))?;
        self.memory.write(0, staged)?;
        self.expand_lists(device)
    }

    /// Turns the lists' bitmaps into places in the cache.
    fn expand_lists(&self, device: &Device) -> Result<(), CudaError> {
        if self.num_lists == 0 {
            return Ok(());
        }
        let kernel = device.kernel(Kernel::EXPAND_LISTS, &[])?;
        let (lists, bitmaps) = (self.address(self.at.lists), self.address(self.at.bitmaps));
        let (tables, slots) = (self.block_tables(), self.list_slots.address());
        let launch = LaunchShape {
            grid: (self.num_lists as u32, 1, 1),
            threads: EXPAND_THREADS,
            shared_bytes: 0,
        };
        // SAFETY: the slots have room for every entry of every list, and an entry lies below its span's length, which the
        // block table covers.
        unsafe {
            device.launch(&kernel, launch, |l| {
                l.arg(&lists).arg(&bitmaps).arg(&tables).arg(&slots);
            })
        }
    }

    /// How keys are cut into units.
    pub(super) fn chunks(&self) -> Chunks {
        self.chunks
    }

    /// Units of decode attention.
    pub(super) fn num_units(&self) -> usize {
        self.num_units
    }

    /// Whether the keys of any head are cut into several chunks.
    pub(super) fn has_pieces(&self) -> bool {
        self.has_pieces
    }

    /// Rows.
    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
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

    pub(super) fn cut_spans(&self) -> u64 {
        self.address(self.at.cut_spans)
    }

    pub(super) fn list_ranges(&self) -> u64 {
        self.address(self.at.list_ranges)
    }

    pub(super) fn list_slots(&self) -> u64 {
        self.list_slots.address()
    }

    pub(super) fn units(&self) -> u64 {
        self.address(self.at.units)
    }
}
