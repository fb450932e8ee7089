//! [`Capturing`]: what a session's captured steps hand out, and who makes use of it.
//!
//! Two need the attention of a captured step: the masks for the target ([`RowSelector`]) and the draft's own reads
//! ([`OwnReads`]). Both want selections from mixed rows. A step asks for those, and for the rows as well: a GPU gives
//! the selections, and no row crosses to the host; the CPU gives the rows, which are mixed and selected from here.

use specattn_engine::{HeadLists, Round, RowSelection, StepOutput};
use specattn_mask::{MaskError, MaskPolicy, Source};

use crate::outgoing::{OutgoingMask, is_long};
use crate::own_reads::{OwnPolicy, OwnReads};
use crate::rows::RowSelector;
use crate::session::DraftShape;

/// The use of one session's captured steps.
#[derive(Debug)]
pub(crate) struct Capturing {
    masks: Option<RowSelector>,
    /// The verify worker lacks the masks before.
    begins_anew: bool,
    own: OwnReads,
    /// Draft layers to capture, increasing.
    layers: Vec<usize>,
    /// A row for each source, then those of the draft's own KV heads.
    selection: RowSelection,
}

impl Capturing {
    /// For a session with masks of `sources`, which are valid for the draft; none: no masks are wanted.
    pub(crate) fn new(
        own: OwnPolicy,
        policy: MaskPolicy,
        sources: Vec<Source>,
        shape: DraftShape,
    ) -> Self {
        let own = OwnReads::new(own, &policy, shape.num_kv_heads);
        let masks = (!sources.is_empty()).then(|| RowSelector::new(policy, sources));
        // The draft's own selection wants every layer, a mask the layers of its sources.
        let layers = match &masks {
            _ if own.is_sparse() => (0..shape.num_layers).collect(),
            Some(masks) => masks.layers(),
            None => Vec::new(),
        };
        let mut rows: Vec<_> = masks.iter().flat_map(RowSelector::mixed_rows).collect();
        rows.extend(own.mixed_rows(shape.num_layers, shape.num_heads));
        Self {
            selection: RowSelection {
                rows,
                round: Round::default(),
            },
            masks,
            begins_anew: false,
            own,
            layers,
        }
    }

    /// Whether step `step` of a round of `round_length` is to be captured: see [`OwnReads::captures`]. A round is, too, while
    /// there is nothing to make its mask of.
    pub(crate) fn captures(&self, step: usize, round_length: usize) -> bool {
        let lacks_mask = self.masks.as_ref().is_some_and(|m| !m.has_selection());
        lacks_mask || self.own.captures(step, round_length)
    }

    /// Whether any masks are wanted.
    pub(crate) fn makes_masks(&self) -> bool {
        self.masks.is_some()
    }

    /// Layers whose attention rows a captured step must hand out.
    pub(crate) fn layers(&self) -> &[usize] {
        &self.layers
    }

    /// What a device may select from a captured step in place of handing out rows.
    pub(crate) fn selection(&self) -> Option<&RowSelection> {
        (!self.selection.rows.is_empty()).then_some(&self.selection)
    }

    /// Fits the draft's own lists to a cache of `past` positions: see [`OwnReads::fit`].
    pub(crate) fn fit(&mut self, past: usize) {
        self.own.fit(past);
    }

    /// What a step between captured ones reads.
    pub(crate) fn lists(&self) -> &HeadLists {
        self.own.lists()
    }

    /// Starts a round over `context_len` cached positions of the target, before its first step.
    pub(crate) fn begin(&mut self, context_len: usize) {
        self.selection.round = Round {
            step: 0,
            context_len,
            ..self.selection.round
        };
        if let Some(masks) = &mut self.masks {
            masks.begin(context_len);
        }
    }

    /// Whether the draft's own selection has been made once.
    pub(crate) fn has_selection(&self) -> bool {
        self.own.has_selection()
    }

    /// Takes the output of a draft step.
    ///
    /// # Errors
    /// [`MaskError`] when a captured row is missing.
    pub(crate) fn stepped(&mut self, output: &StepOutput) -> Result<(), MaskError> {
        if let Some(masks) = &mut self.masks {
            if let Some(selected) = &output.selected {
                self.selection.round.step += 1;
                masks.add_selected(selected);
            } else if let Some(rows) = &output.attention {
                masks.add_step(rows)?;
            }
        }
        self.guessed(output);
        Ok(())
    }

    /// Takes the output of a step that no mask is made of: the guess of a verdict.
    pub(crate) fn guessed(&mut self, output: &StepOutput) {
        if let Some(selected) = &output.selected {
            let of_sources = self.masks.as_ref().map_or(0, RowSelector::num_sources);
            self.own.selected(selected, of_sources);
        } else if let Some(rows) = &output.attention {
            self.own.captured(rows);
        } else {
            self.own.passed();
        }
    }

    /// Whether the round's mask stands although `left` of its steps are to come, and is worth a message of its own: what it
    /// takes to encode and to read a long one passes while the draft steps on.
    pub(crate) fn has_early_mask(&self, left: usize) -> bool {
        let is_worth_it = |masks: &RowSelector| {
            masks.has_selection() && is_long(masks.num_sources(), masks.context_len())
        };
        self.masks.as_ref().is_some_and(is_worth_it) && !self.own.captures_within(left)
    }

    /// Ends the round's selections: its mask, where any are wanted.
    pub(crate) fn finish(&mut self) -> Option<OutgoingMask> {
        let round = self.masks.as_mut()?.finish().clone();
        Some(OutgoingMask {
            round,
            is_first: std::mem::take(&mut self.begins_anew),
        })
    }

    /// Masks must reach this share of a row's mass from the next step on.
    pub(crate) fn set_mass(&mut self, p: f32) {
        let Some(masks) = &mut self.masks else { return };
        masks.set_mass(p);
        for (row, mixed) in self.selection.rows.iter_mut().zip(masks.mixed_rows()) {
            row.p = mixed.p;
        }
    }

    /// The next mask is a full one.
    pub(crate) fn forget_base(&mut self) {
        self.begins_anew = true;
    }
}

#[cfg(test)]
mod tests {
    use specattn_engine::{AttentionRows, SelectedRows};

    use super::*;

    const KV_LEN: usize = 100;

    fn capturing() -> Capturing {
        let own = OwnPolicy {
            capture_every: 2,
            p: 0.9,
        };
        let sources = vec![Source::layer_mean(1, 2), Source::layer_mean(0, 2)];
        let shape = DraftShape {
            vocab_size: 10,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
        };
        Capturing::new(own, MaskPolicy::default(), sources, shape)
    }

    /// All of a layer's mass on one position.
    fn rows(heavy: [usize; 2]) -> StepOutput {
        let mut probs = vec![0.0; 2 * 2 * KV_LEN];
        for (row, probs) in probs.chunks_exact_mut(KV_LEN).enumerate() {
            probs[heavy[row / 2]] = 1.0;
        }
        StepOutput {
            attention: Some(AttentionRows {
                layers: vec![0, 1],
                num_heads: 2,
                kv_len: KV_LEN,
                probs,
            }),
            ..StepOutput::default()
        }
    }

    /// What a device would select from those.
    fn selections(heavy: [usize; 2], asked: &RowSelection) -> StepOutput {
        let mut words = Vec::new();
        for row in &asked.rows {
            let position = heavy[row.terms[0].layer as usize];
            words.extend((0..2).map(|word| u64::from(position / 64 == word) << (position % 64)));
        }
        StepOutput {
            selected: Some(SelectedRows {
                kv_len: KV_LEN,
                words,
            }),
            ..StepOutput::default()
        }
    }

    #[test]
    fn selections_made_on_a_device_come_to_the_same_as_rows() {
        let (mut by_rows, mut by_device) = (capturing(), capturing());
        let asked = by_device.selection().unwrap().clone();
        // Two sources, then a KV head of each layer.
        assert_eq!(asked.rows.len(), 4);
        assert_eq!(asked.rows[0].terms[0].layer, 1);
        assert_eq!((asked.rows[0].p, asked.rows[2].p), (0.95, 0.9));
        for heavy in [[3, 7], [65, 20]] {
            by_rows.begin(90);
            by_device.begin(90);
            by_rows.stepped(&rows(heavy)).unwrap();
            by_device.stepped(&selections(heavy, &asked)).unwrap();
            by_rows.fit(KV_LEN);
            by_device.fit(KV_LEN);
            assert_eq!(by_rows.lists(), by_device.lists());
            assert!(by_rows.lists().lists[0].contains(heavy[0]));
            let mask = by_device.finish();
            assert_eq!(by_rows.finish(), mask);
        }
    }

    #[test]
    fn steps_of_a_round_are_counted_for_sources_of_means() {
        let mut source = Source::layer_mean(1, 2);
        source.spread = Some(0.5);
        let shape = DraftShape {
            vocab_size: 10,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
        };
        let own = OwnPolicy::default();
        let mut capturing = Capturing::new(own, MaskPolicy::default(), vec![source], shape);
        capturing.begin(90);
        let asked = capturing.selection().unwrap().clone();
        assert_eq!(asked.rows[0].spread.map(|spread| spread.share), Some(0.5));
        assert_eq!((asked.round.step, asked.round.context_len), (0, 90));
        capturing.stepped(&selections([3, 7], &asked)).unwrap();
        assert_eq!(capturing.selection().unwrap().round.step, 1);
        capturing.begin(92);
        let next = capturing.selection().unwrap().round;
        assert_eq!(
            (next.id, next.step, next.context_len),
            (asked.round.id, 0, 92)
        );
    }

    #[test]
    fn a_new_mass_reaches_the_device() {
        let mut capturing = capturing();
        capturing.set_mass(0.5);
        let p: Vec<f32> = capturing
            .selection()
            .unwrap()
            .rows
            .iter()
            .map(|row| row.p)
            .collect();
        assert_eq!(p, [0.5, 0.5, 0.9, 0.9]);
    }

    #[test]
    fn a_device_makes_masks() {
        let mut capturing = capturing();
        let asked = capturing.selection().unwrap().clone();
        capturing.begin(90);
        capturing.stepped(&selections([5, 95], &asked)).unwrap();
        let mask = capturing.finish().unwrap().round;
        // The round's own inputs are not masked.
        assert_eq!(mask.sources[0].count(), 0);
        assert!(mask.sources[1].iter().eq([5]));
    }
}
