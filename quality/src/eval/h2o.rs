//! H2O (Zhang et al. 2023): a fixed budget per head, half of it recent, half of it heavy hitters by the attention that
//! they have gathered so far. What is evicted never comes back.

use specattn_engine::{HeadLists, StepOutput};
use specattn_mask::PositionSet;

use crate::error::QualityError;
use crate::eval::method::{Choice, Masker};

/// Column sums of the target's attention over the prompt: `[KV heads over all layers][cached positions]`.
pub type PromptSums = Vec<Vec<f32>>;

/// The state of every head.
#[derive(Debug)]
pub struct HeavyHitters {
    budget: f64,
    /// Attention gathered; `[heads][positions]`.
    sums: Vec<Vec<f32>>,
    /// What each head has not evicted.
    lists: HeadLists,
}

impl HeavyHitters {
    /// For a target whose prompt gathered `prompt`.
    pub fn new(budget: f64, prompt: &PromptSums) -> Self {
        Self {
            budget,
            sums: prompt.clone(),
            lists: HeadLists {
                lists: Vec::new(),
                of_head: (0..prompt.len() as u32).collect(),
            },
        }
    }

    /// What a head keeps of `alive` positions: the last half of the budget, and the heaviest of the others.
    fn evict(alive: &mut Vec<usize>, sums: &[f32], room: usize) {
        if alive.len() <= room {
            return;
        }
        let recent = alive.split_off(alive.len() - room / 2);
        let heavy = room - recent.len();
        alive.sort_unstable_by(|&a, &b| sums[b].total_cmp(&sums[a]));
        alive.truncate(heavy);
        alive.sort_unstable();
        alive.extend(recent);
    }
}

impl Masker for HeavyHitters {
    fn start(&mut self, cached: usize) {
        self.lists.lists = vec![(0..cached).collect(); self.sums.len()];
    }

    fn choose(&mut self, base: usize) -> Result<Choice<'_>, QualityError> {
        let cached = base - 1;
        let room = (cached as f64 * self.budget) as usize;
        for (list, sums) in self.lists.lists.iter_mut().zip(&mut self.sums) {
            let mut alive: Vec<usize> = list.iter().chain(sums.len()..cached).collect();
            sums.resize(cached, 0.0);
            Self::evict(&mut alive, sums, room);
            *list = PositionSet::from_positions(cached, alive);
        }
        Ok(Choice::Lists(&self.lists))
    }

    fn wants_masses(&self) -> bool {
        true
    }

    fn settle(&mut self, output: &StepOutput) {
        let Some(masses) = &output.masses else { return };
        let heads = self.sums.iter_mut().zip(&self.lists.lists);
        for ((sums, list), masses) in heads.zip(&masses.of_head) {
            for (position, mass) in list.iter().zip(masses) {
                sums[position] += mass;
            }
        }
    }
}
