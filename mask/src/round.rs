//! One round's selections: [`RoundMask`], and [`RoundSelector`] which makes it on the draft side.

use crate::memory::shifted_mass;
use crate::policy::MaskPolicy;
use crate::source::Source;
use crate::spread::spread;
use crate::top_p::select_top_p;
use specattn_positions::PositionSet;

/// The selections of one round, one per source in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RoundMask {
    /// Positions the target has cached when it verifies the round: the round's base - 1.
    pub context_len: usize,
    /// Groups of this many consecutive positions are kept as a whole.
    pub granularity: u32,
    /// Selections over `[0, context_len)`, in the order of the session's sources.
    pub sources: Vec<PositionSet>,
}

impl RoundMask {
    /// Groups of [`granularity`](Self::granularity) positions in the context.
    pub fn groups(&self) -> usize {
        self.context_len.div_ceil(self.granularity.max(1) as usize)
    }
}

/// Gathers a round's selections while the draft steps: of each source the union over steps or the selection of their
/// mean, then whole groups.
///
/// For one list that serves all of a round's queries, the mean's selection carries the most of their mass for its length;
/// a union also keeps what a single noisy row puts first.
#[derive(Debug)]
pub struct RoundSelector {
    policy: MaskPolicy,
    context_len: usize,
    sources: Vec<Gathered>,
    /// A spread row: kept between rounds.
    spread: Vec<f32>,
}

/// What a source has come to in the round so far.
#[derive(Debug)]
struct Gathered {
    /// Log-odds above those of the policy's p.
    p_offset: f32,
    /// The share by which the steps' sum is spread, for a source of means.
    spread: Option<f32>,
    /// Sum of the steps' rows over the context, for a source of means.
    sum: Vec<f32>,
    /// Union of the steps' selections, for a source of unions; for one of means what was selected elsewhere, if it was.
    union: PositionSet,
    /// Whether a source of means was selected from elsewhere.
    is_selected: bool,
}

impl Gathered {
    /// The share of a row's mass to reach in a session of mass `p`.
    fn mass(&self, p: f32) -> f32 {
        shifted_mass(p, self.p_offset)
    }
}

impl RoundSelector {
    /// A selector for the rows of `sources` under a policy that is valid ([`MaskPolicy::validate`]).
    pub fn new(policy: MaskPolicy, sources: &[Source]) -> Self {
        Self {
            policy,
            context_len: 0,
            sources: sources
                .iter()
                .map(|source| Gathered {
                    p_offset: source.p_offset,
                    spread: source.spread,
                    sum: Vec::new(),
                    union: PositionSet::default(),
                    is_selected: false,
                })
                .collect(),
            spread: Vec::new(),
        }
    }

    /// Selections must reach `p`, moved by their source's offset, of a row's mass, in (0, 1]. Unions of steps that were
    /// added before stay as they are.
    pub fn set_mass(&mut self, p: f32) {
        self.policy.p = p;
    }

    /// Starts a round over `context_len` cached positions (the round's base - 1), forgetting an unfinished one.
    pub fn begin(&mut self, context_len: usize) {
        self.context_len = context_len;
        for source in &mut self.sources {
            source.union.clear();
            source.union.resize(context_len);
            source.is_selected = false;
            source.sum.clear();
            if source.spread.is_some() {
                source.sum.resize(context_len, 0.0);
            }
        }
    }

    /// Adds one draft step's row of source `source`. The row covers the context and the round's own inputs up to the
    /// step; those are always read, so only positions below `context_len` are selected, and summed.
    ///
    /// # Panics
    /// When there is no such source.
    pub fn add_step(&mut self, source: usize, row: &[f32]) {
        let source = &mut self.sources[source];
        if source.spread.is_some() {
            for (sum, &x) in source.sum.iter_mut().zip(row) {
                *sum += x;
            }
        } else {
            select_top_p(row, source.mass(self.policy.p), &mut source.union);
        }
    }

    /// Adds what was selected elsewhere by the mass of [`mass_of`](Self::mass_of): bit i of word w is position 64 w + i. For a
    /// source of unions that is a selection from one draft step's row; for one of means it is the selection from all rows
    /// of the round so far, which takes the place of the one before.
    ///
    /// # Panics
    /// When there is no such source.
    pub fn add_selected(&mut self, source: usize, words: &[u64]) {
        let source = &mut self.sources[source];
        if source.spread.is_some() {
            source.is_selected = true;
            source.union.clear();
            source.union.resize(self.context_len);
        }
        source.union.union_with_words(words);
    }

    /// The share of a row's mass that selections from source `source` reach.
    ///
    /// # Panics
    /// When there is no such source.
    pub fn mass_of(&self, source: usize) -> f32 {
        self.sources[source].mass(self.policy.p)
    }

    /// Ends the round. The next one begins with [`begin`](Self::begin).
    pub fn finish(&mut self) -> RoundMask {
        let sources = self
            .sources
            .iter_mut()
            .map(|source| {
                let mut set = std::mem::take(&mut source.union);
                if let Some(share) = source.spread.filter(|_| !source.is_selected) {
                    let p = source.mass(self.policy.p);
                    spread(&source.sum, share, &mut self.spread);
                    select_top_p(&self.spread, p, &mut set);
                }
                set.fill_groups(self.policy.granularity as usize);
                set
            })
            .collect();
        RoundMask {
            context_len: self.context_len,
            granularity: self.policy.granularity.max(1),
            sources,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(count: usize) -> Vec<Source> {
        vec![Source::layer_mean(0, 1); count]
    }

    fn row(len: usize, heavy: &[usize]) -> Vec<f32> {
        let mut row = vec![0.0; len];
        for &position in heavy {
            row[position] = 1.0 / heavy.len() as f32;
        }
        row
    }

    #[test]
    fn unites_steps_per_source_and_drops_the_rounds_own_inputs() {
        let mut selector = RoundSelector::new(MaskPolicy::default(), &sources(2));
        selector.begin(10);
        selector.add_step(0, &row(11, &[1, 10]));
        selector.add_step(0, &row(12, &[7, 11]));
        selector.add_step(1, &row(11, &[3]));
        let mask = selector.finish();
        assert_eq!(mask.context_len, 10);
        assert!(mask.sources[0].iter().eq([1, 7]));
        assert!(mask.sources[1].iter().eq([3]));
    }

    #[test]
    fn a_source_reaches_its_own_mass() {
        let mut sources = sources(2);
        sources[1].p_offset = -2.0;
        let mut selector = RoundSelector::new(MaskPolicy::default(), &sources);
        selector.begin(4);
        let row = [0.7, 0.2, 0.06, 0.04];
        selector.add_step(0, &row);
        selector.add_step(1, &row);
        let mask = selector.finish();
        assert!(mask.sources[0].iter().eq([0, 1, 2]));
        // The log-odds of 0.95 less 2 are those of 0.72.
        assert!(mask.sources[1].iter().eq([0, 1]));
    }

    #[test]
    fn means_that_were_selected_from_elsewhere_take_the_last_word() {
        let mut sources = sources(1);
        sources[0].spread = Some(0.5);
        let mut selector = RoundSelector::new(MaskPolicy::default(), &sources);
        selector.begin(6);
        selector.add_selected(0, &[0b1]);
        selector.add_selected(0, &[0b1100_0110]);
        assert!(selector.finish().sources[0].iter().eq([1, 2]));
        // The next round may have rows again.
        selector.begin(6);
        selector.add_step(0, &row(7, &[4]));
        assert!(selector.finish().sources[0].iter().any(|i| i == 4));
    }

    #[test]
    fn a_source_of_means_selects_once_among_the_context() {
        let mut sources = sources(2);
        sources[0].spread = Some(0.0);
        sources[1].spread = Some(0.5);
        let policy = MaskPolicy {
            p: 0.6,
            ..MaskPolicy::default()
        };
        let mut selector = RoundSelector::new(policy, &sources);
        selector.begin(10);
        for source in [0, 1] {
            // The round's own inputs, from position 10 on, weigh most in either row and do not count.
            for own in [10, 11] {
                let mut row = row(12, &[]);
                (row[2], row[8], row[own]) = (0.4, 0.1, 0.5);
                selector.add_step(source, &row);
            }
        }
        let mask = selector.finish();
        assert!(mask.sources[0].iter().eq([2]));
        // Spread, 2 and its neighbours weigh 1.6 of 2.64, position 8 weighs 0.2.
        assert!(mask.sources[1].iter().eq([1, 2, 3]));
        selector.begin(4);
        assert_eq!(
            selector.finish().sources,
            [PositionSet::new(4), PositionSet::new(4)]
        );
    }

    #[test]
    fn selections_made_elsewhere_count_as_steps() {
        let mut selector = RoundSelector::new(MaskPolicy::default(), &sources(1));
        selector.begin(70);
        selector.add_step(0, &row(71, &[5]));
        selector.add_selected(0, &[1 << 3, 1 << 1 | 1 << 6 | 1 << 63]);
        assert!(selector.finish().sources[0].iter().eq([3, 5, 65]));
        selector.begin(130);
        selector.add_selected(0, &[1]);
        assert!(selector.finish().sources[0].iter().eq([0]));
    }

    #[test]
    fn a_new_round_starts_empty() {
        let mut selector = RoundSelector::new(MaskPolicy::default(), &sources(1));
        selector.begin(10);
        selector.add_step(0, &row(11, &[5]));
        selector.begin(20);
        let mask = selector.finish();
        assert_eq!(mask.sources, [PositionSet::new(20)]);
        selector.begin(4);
        assert_eq!(selector.finish().sources, [PositionSet::new(4)]);
    }

    #[test]
    fn granularity_keeps_whole_groups() {
        let policy = MaskPolicy {
            granularity: 4,
            ..MaskPolicy::default()
        };
        let mut selector = RoundSelector::new(policy, &sources(1));
        selector.begin(10);
        selector.add_step(0, &row(11, &[5, 9]));
        let mask = selector.finish();
        assert!(mask.sources[0].iter().eq([4, 5, 6, 7, 8, 9]));
        assert_eq!(mask.groups(), 3);
    }
}
