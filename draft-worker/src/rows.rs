//! [`RowSelector`]: from the attention rows of a round's captured steps to the round's mask.

use specattn_engine::{AttentionRows, MixedHead, MixedRow, SelectedRows, Spread};
use specattn_mask::source::{Term, layers_in_use};
use specattn_mask::spread::REACH;
use specattn_mask::{MaskError, MaskPolicy, RoundMask, RoundSelector, Source};

/// Mixes, selects and unites for one session.
#[derive(Debug)]
pub struct RowSelector {
    sources: Vec<Source>,
    selector: RoundSelector,
    context_len: usize,
    /// Whether the round has a captured step.
    has_rows: bool,
    /// The mask before: a round without a captured step says the same again.
    last: RoundMask,
    /// A source's row: kept between steps.
    mixed: Vec<f32>,
}

impl RowSelector {
    /// A selector for sources that are valid for the draft model.
    pub fn new(policy: MaskPolicy, sources: Vec<Source>) -> Self {
        Self {
            selector: RoundSelector::new(policy, &sources),
            sources,
            context_len: 0,
            has_rows: false,
            last: RoundMask::default(),
            mixed: Vec::new(),
        }
    }

    /// The draft layers that the sources mix, increasing.
    pub fn layers(&self) -> Vec<usize> {
        layers_in_use(&self.sources)
    }

    /// Starts a round over `context_len` cached positions of the target. What was captured in a round that was given up is
    /// not lost: it is the mask before.
    pub fn begin(&mut self, context_len: usize) {
        self.settle();
        self.context_len = context_len;
    }

    /// Whether there is anything to make a mask of: a captured step, of this round or of one before.
    pub fn has_selection(&self) -> bool {
        self.has_rows || !self.last.sources.is_empty()
    }

    /// Makes the rows of the captured steps, if there are any, the mask before.
    fn settle(&mut self) -> bool {
        let has_rows = std::mem::take(&mut self.has_rows);
        if has_rows {
            self.last = self.selector.finish();
        }
        has_rows
    }

    /// Adds one captured step's rows.
    ///
    /// # Errors
    /// [`MaskError`] when a row is missing.
    pub fn add_step(&mut self, rows: &AttentionRows) -> Result<(), MaskError> {
        if !std::mem::replace(&mut self.has_rows, true) {
            self.selector.begin(self.context_len);
        }
        for (index, source) in self.sources.iter().enumerate() {
            let row = |layer: u32, head: u32| rows.row(layer as usize, head as usize);
            source.mix(row, &mut self.mixed)?;
            self.selector.add_step(index, &self.mixed);
        }
        Ok(())
    }

    /// Adds one captured step's selections, those of [`RowSelector::mixed_rows`] first.
    pub fn add_selected(&mut self, selected: &SelectedRows) {
        if !std::mem::replace(&mut self.has_rows, true) {
            self.selector.begin(self.context_len);
        }
        for source in 0..self.sources.len() {
            self.selector.add_selected(source, selected.row(source));
        }
    }

    /// The sources as rows that a device may select from.
    pub fn mixed_rows(&self) -> impl Iterator<Item = MixedRow> {
        self.sources.iter().enumerate().map(|(index, source)| {
            let term = |term: &Term| MixedHead {
                layer: term.layer,
                head: term.head,
                weight: term.weight,
            };
            MixedRow {
                terms: source.terms.iter().map(term).collect(),
                p: self.selector.mass_of(index),
                spread: source.spread.map(|share| Spread {
                    share,
                    reach: REACH as u32,
                }),
            }
        })
    }

    /// Positions that the round's mask is about.
    pub fn context_len(&self) -> usize {
        self.context_len
    }

    /// Sources.
    pub fn num_sources(&self) -> usize {
        self.sources.len()
    }

    /// Ends the round: its mask.
    pub fn finish(&mut self) -> &RoundMask {
        if !self.settle() {
            self.carry_over();
        }
        &self.last
    }

    /// Brings the mask before to this round's context: whatever was appended since is kept.
    fn carry_over(&mut self) {
        let seen = self.last.context_len;
        for set in &mut self.last.sources {
            set.resize(self.context_len);
            set.insert_range(seen, self.context_len);
            set.fill_groups(self.last.granularity as usize);
        }
        self.last.context_len = self.context_len;
    }

    /// Selections must reach this share of a row's mass from the next step on.
    pub(crate) fn set_mass(&mut self, p: f32) {
        self.selector.set_mass(p);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of `kv_len` positions of the only head, all of it on `heavy`.
    fn row(kv_len: usize, heavy: usize) -> AttentionRows {
        let mut probs = vec![0.0; kv_len];
        probs[heavy] = 1.0;
        AttentionRows {
            layers: vec![0],
            num_heads: 1,
            kv_len,
            probs,
        }
    }

    #[test]
    fn a_round_without_rows_repeats_its_mask_and_adds_what_is_new() {
        let mut rows = RowSelector::new(MaskPolicy::default(), vec![Source::layer_mean(0, 1)]);
        let kept = |rows: &mut RowSelector| -> (usize, Vec<usize>) {
            let mask = rows.finish();
            (mask.context_len, mask.sources[0].iter().collect())
        };
        rows.begin(10);
        rows.add_step(&row(11, 3)).unwrap();
        rows.add_step(&row(12, 7)).unwrap();
        assert_eq!(kept(&mut rows), (10, vec![3, 7]));
        rows.begin(12);
        assert_eq!(kept(&mut rows), (12, vec![3, 7, 10, 11]));
        // A rollback, then a captured round: nothing of the old selection is left.
        rows.begin(5);
        assert_eq!(kept(&mut rows), (5, vec![3]));
        rows.begin(6);
        rows.add_step(&row(7, 2)).unwrap();
        assert_eq!(kept(&mut rows), (6, vec![2]));
    }

    #[test]
    fn a_round_that_was_given_up_leaves_its_rows() {
        let mut rows = RowSelector::new(MaskPolicy::default(), vec![Source::layer_mean(0, 1)]);
        assert!(!rows.has_selection());
        rows.begin(10);
        rows.add_step(&row(11, 3)).unwrap();
        assert!(rows.has_selection());
        // The target went on alone: the next round begins where it is now, without a captured step.
        rows.begin(11);
        assert!(rows.has_selection());
        let mask = rows.finish();
        assert_eq!((mask.context_len, mask.sources.len()), (11, 1));
        assert!(mask.sources[0].iter().eq([3, 10]));
    }
}
