//! One round's selections: [`RoundMask`], and [`RoundSelector`] which makes it on the draft side.

use crate::memory::shifted_mass;
use crate::policy::MaskPolicy;
use crate::position_set::PositionSet;
use crate::source::Source;
use crate::top_p::{Selection, select_top_p};

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

/// Gathers a round's selections while the draft steps: the union over steps, then whole groups.
#[derive(Debug)]
pub struct RoundSelector {
    policy: MaskPolicy,
    context_len: usize,
    sources: Vec<PositionSet>,
    /// Of each source: log-odds above those of the policy's p.
    p_offsets: Vec<f32>,
}

impl RoundSelector {
    /// A selector for the rows of `sources` under a policy that is valid ([`MaskPolicy::validate`]).
    pub fn new(policy: MaskPolicy, sources: &[Source]) -> Self {
        Self {
            policy,
            context_len: 0,
            sources: vec![PositionSet::default(); sources.len()],
            p_offsets: sources.iter().map(|source| source.p_offset).collect(),
        }
    }

    /// Selections must reach `p`, moved by their source's offset, of a row's mass from the next step on, in (0, 1].
    pub fn set_mass(&mut self, p: f32) {
        self.policy.p = p;
    }

    /// Starts a round over `context_len` cached positions (the round's base - 1), forgetting an unfinished one.
    pub fn begin(&mut self, context_len: usize) {
        self.context_len = context_len;
        for source in &mut self.sources {
            source.clear();
            source.resize(context_len);
        }
    }

    /// Adds one draft step's row of source `source`. The row covers the context and the round's own inputs up to the
    /// step; those are always read, so only positions below `context_len` are selected.
    ///
    /// # Panics
    /// When there is no such source.
    pub fn add_step(&mut self, source: usize, row: &[f32]) -> Selection {
        let p = shifted_mass(self.policy.p, self.p_offsets[source]);
        select_top_p(row, p, &mut self.sources[source])
    }

    /// Ends the round. The next one begins with [`begin`](Self::begin).
    pub fn finish(&mut self) -> RoundMask {
        let sources = self
            .sources
            .iter_mut()
            .map(|source| {
                let mut set = std::mem::take(source);
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
