//! [`RowMixer`]: from the captured scores of each layer to selections, without a row leaving the device.
//!
//! Rows are mixed while scores are still in the L2 cache: a few layers' at a time, as many as fit there, so that these are all that is
//! ever stored, and a row that mixes heads of more layers grows from one group of them to the next. After the last layer all rows of
//! all spans are selected from by one launch; rows of means are gathered first ([`RoundSums`]).

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::bucket::bucket;
use super::device::Device;
use super::error::CudaError;
use super::kernel_cache::Kernel;
use super::memory::DeviceMemory;
use super::pinned::PinnedMemory;
use super::recording::LaunchShape;
use super::round_sums::RoundSums;
use super::selection::{ROW_STEP, RowSpec, Selector};
use crate::backend::Pass;
use crate::crew::Crew;
use crate::row_selection::{MixedHead, SelectedRows};

/// Words of a job; mirrors `MixJob` in selection.cu.
const JOB_WORDS: usize = 8;

/// Scores that are kept until they are mixed: they stay in any L2 cache that this backend meets.
const GROUP_BYTES: usize = 16 << 20;

/// The scores that a pass leaves.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Captured {
    /// Tokens per capturing span: all of the longest one, or the last of each.
    pub(super) tokens: usize,
    /// Query heads.
    pub(super) num_heads: usize,
    /// Rows of a layer: capturing spans, tokens, heads.
    pub(super) layer_rows: usize,
    /// Entries from row to row.
    pub(super) stride: usize,
}

impl Captured {
    /// Layers whose scores are kept at a time.
    pub(super) fn group_layers(&self) -> usize {
        (GROUP_BYTES / (self.layer_rows * self.stride * 4).max(1)).max(1)
    }
}

/// The rows that one pass selects from.
pub(super) struct RowMixer {
    device: Arc<Device>,
    /// Jobs, group of layers by group, then rows of means, then the jobs' terms.
    plan: DeviceMemory,
    /// What carries it there; left alone until the pass has ended.
    upload: PinnedMemory,
    /// `[rows, stride]`.
    rows: DeviceMemory,
    selector: Selector,
    sums: RoundSums,
    /// Jobs by group of layers, and their terms; kept for their memory.
    jobs: Vec<Vec<u32>>,
    terms: Vec<u32>,
    words: Vec<u32>,
    jobs_of_group: Vec<Range<usize>>,
    first_mean: usize,
    first_term: usize,
    specs: Vec<RowSpec>,
    stride: usize,
}

impl RowMixer {
    /// A mixer without memory yet.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            plan: DeviceMemory::new(device),
            upload: device.pinned(),
            rows: DeviceMemory::new(device),
            selector: Selector::new(device),
            sums: RoundSums::new(device),
            jobs: Vec::new(),
            terms: Vec::new(),
            words: Vec::new(),
            jobs_of_group: Vec::new(),
            first_mean: 0,
            first_term: 0,
            specs: Vec::new(),
            stride: 0,
        }
    }

    /// Takes the selections of `pass`, which will leave these scores.
    pub(super) fn begin(&mut self, pass: &Pass<'_>, captured: Captured) -> Result<(), CudaError> {
        let layers = captured.group_layers();
        let group_of = |term: &MixedHead| term.layer as usize / layers;
        self.specs.clear();
        self.sums.begin();
        self.jobs.iter_mut().for_each(Vec::clear);
        self.terms.clear();
        let mut means = Vec::new();
        let mut longest = 0;
        for &(span, selection) in &pass.selections {
            let number = pass.captures.iter().position(|&c| c == span);
            let number = number.expect("a span that selects is among the pass's captures");
            let span = &pass.spans[span];
            let last = (captured.tokens - 1).min(span.rows.len() - 1);
            let first_row = (number * captured.tokens + last) * captured.num_heads;
            let length = span.past + span.rows.len();
            longest = longest.max(length);
            let first = self.specs.len();
            let spread = selection.rows.iter().zip(first..);
            let spread: Vec<_> = spread
                .filter_map(|(row, number)| Some((number, row.spread?)))
                .collect();
            self.sums
                .describe(selection.round, &spread, length, &mut means)?;
            for row in &selection.rows {
                for (index, chunk) in by_layer(&row.terms)
                    .chunk_by(|a, b| group_of(a) == group_of(b))
                    .enumerate()
                {
                    let group = group_of(&chunk[0]);
                    if self.jobs.len() <= group {
                        self.jobs.resize_with(group + 1, Vec::new);
                    }
                    self.jobs[group].extend([
                        self.specs.len() as u32,
                        first_row as u32,
                        self.terms.len() as u32 / 2,
                        chunk.len() as u32,
                        length as u32,
                        u32::from(index > 0),
                        0,
                        0,
                    ]);
                    let captured_row = |term: &MixedHead| {
                        let layer = term.layer as usize % layers;
                        (layer * captured.layer_rows) as u32 + term.head
                    };
                    let terms = chunk
                        .iter()
                        .flat_map(|t| [captured_row(t), t.weight.to_bits()]);
                    self.terms.extend(terms);
                }
                self.specs.push(RowSpec { length, p: row.p });
            }
        }
        self.jobs_of_group.clear();
        let words = &mut self.words;
        words.clear();
        for of_group in &self.jobs {
            let first = words.len() / JOB_WORDS;
            words.extend_from_slice(of_group);
            self.jobs_of_group.push(first..words.len() / JOB_WORDS);
        }
        self.first_mean = words.len();
        words.extend_from_slice(&means);
        self.first_term = words.len();
        words.extend_from_slice(&self.terms);
        self.stride = bucket(longest, ROW_STEP);
        self.selector.describe(&self.specs)?;
        self.rows.grow(self.specs.len() * self.stride * 4)?;
        self.plan.grow(self.words.len() * 4)?;
        self.plan.write_pinned(0, &self.words, &mut self.upload)
    }

    /// Adds what the scores of [`RowMixer::begin`] give to the rows, once those of a whole group of layers are there: `layer`, of so
    /// many, is the one that was captured last, and `(scores, statistics)` is where the group's begin.
    pub(super) fn mix(
        &self,
        captured: Captured,
        (layer, layers): (usize, usize),
        (scores, statistics): (u64, u64),
    ) -> Result<(), CudaError> {
        let in_group = captured.group_layers();
        if (layer + 1) % in_group != 0 && layer + 1 != layers {
            return Ok(());
        }
        let jobs = self.jobs_of_group.get(layer / in_group);
        let Some(jobs) = jobs.filter(|jobs| !jobs.is_empty()) else {
            return Ok(());
        };
        let kernel = self.device.kernel(Kernel::MIX_ROWS, &[])?;
        let plan = self.plan.address();
        let job_address = plan + (jobs.start * JOB_WORDS * 4) as u64;
        let term_address = plan + (self.first_term * 4) as u64;
        let (rows, row_stride) = (self.rows.address(), self.stride as u32);
        let score_stride = captured.stride as u32;
        let launch = LaunchShape {
            grid: (row_stride.div_ceil(1024), jobs.len() as u32, 1),
            threads: 256,
            shared_bytes: 0,
        };
        // SAFETY: jobs name rows below the number that memory was made for, and heads of captured tokens.
        unsafe {
            self.device.launch(&kernel, launch, |l| {
                l.arg(&scores)
                    .arg(&statistics)
                    .arg(&job_address)
                    .arg(&term_address)
                    .arg(&rows)
                    .arg(&score_stride)
                    .arg(&row_stride);
            })
        }
    }

    /// Selects from the rows, and brings each span's selections to the host.
    pub(super) fn select(
        &mut self,
        pass: &Pass<'_>,
        (out, crew): (&mut [&mut SelectedRows], &mut Crew),
        host: &mut PinnedMemory,
    ) -> Result<(), CudaError> {
        let means = self.plan.address() + (self.first_mean * 4) as u64;
        self.sums.gather(means, self.rows.address(), self.stride)?;
        self.selector.top_p(&self.rows, self.stride, &self.specs)?;
        let words = self.selector.words() / 2;
        let selected = self.selector.selected();
        let bits: &[u64] = selected.read_pinned(0, self.specs.len() * words, host)?;
        let mut rest = bits;
        let mut parts = Vec::new();
        for (out, (_, selection)) in out.iter_mut().zip(&pass.selections) {
            let (own, others) = rest.split_at(selection.rows.len() * words);
            parts.push((out, own));
            rest = others;
        }
        // Megabytes where many sessions have their own reads chosen.
        crew.for_each(&mut parts, |(out, bits)| {
            let own = out.words_per_row();
            out.words.clear();
            out.words.reserve_exact(bits.len() / words * own);
            for row in bits.chunks_exact(words) {
                out.words.extend_from_slice(&row[..own]);
            }
        });
        Ok(())
    }
}

/// The terms by layer, as most rows have them.
fn by_layer(terms: &[MixedHead]) -> Cow<'_, [MixedHead]> {
    if terms.is_sorted_by_key(|term| term.layer) {
        return Cow::Borrowed(terms);
    }
    let mut sorted = terms.to_vec();
    sorted.sort_by_key(|term| term.layer);
    Cow::Owned(sorted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_of_layers_fits_the_cache_or_is_one_layer() {
        let of = |spans: usize, stride| Captured {
            tokens: 1,
            num_heads: 32,
            layer_rows: spans * 32,
            stride,
        };
        assert_eq!(of(1, 4096).group_layers(), 32);
        assert_eq!(of(1, 32_768).group_layers(), 4);
        assert_eq!(of(32, 8192).group_layers(), 1);
        assert!(Captured::default().group_layers() > 0);
    }

    #[test]
    fn terms_come_by_layer() {
        let term = |layer, head| MixedHead {
            layer,
            head,
            weight: 0.5,
        };
        let sorted = [term(0, 3), term(0, 1), term(2, 0)];
        assert!(matches!(by_layer(&sorted), Cow::Borrowed(_)));
        let mixed = [term(2, 0), term(0, 3), term(0, 1)];
        assert_eq!(by_layer(&mixed)[..], sorted);
    }
}
