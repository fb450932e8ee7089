//! Models by a script: a target whose next token follows from the last and its position, and a draft that agrees with it on a
//! share of them.

use specattn_engine::{KvReads, LogitRows, Model, Script, ScriptedShape, Step, StepOutput};
use specattn_worker::clock;

use crate::simulate::cost::{Cost, Part};

/// Tokens in the vocabulary.
pub const VOCAB: u32 = 64;

/// Longest context.
pub const CONTEXT: usize = 1 << 17;

/// The target's token behind `token` at `position`.
pub fn next(token: u32, position: usize) -> u32 {
    (mixed(u64::from(token) << 32 | position as u64) % u64::from(VOCAB)) as u32
}

/// Well-spread bits (the finaliser of SplitMix64).
pub fn mixed(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// A model of this cost that agrees with the target on this share of tokens: 1 is the target.
#[derive(Debug, Clone, Copy)]
struct Scripted {
    cost: Cost,
    agreement: f64,
}

impl Scripted {
    fn token(&self, token: u32, position: usize) -> u32 {
        let next = next(token, position);
        let dice = mixed(!(u64::from(token) << 32 | position as u64)) as f64 / u64::MAX as f64;
        if dice < self.agreement {
            next
        } else {
            (next + 1) % VOCAB
        }
    }
}

impl Script for Scripted {
    fn answer(&mut self, steps: &[Step<'_>]) -> Vec<StepOutput> {
        clock::advance(self.cost.of(steps.iter().map(Part::from)));
        let outputs = steps.iter().map(|step| {
            let past = step.sequence.len();
            let rows = match step.logits {
                LogitRows::None | LogitRows::Replay => 0..0,
                LogitRows::Last => step.tokens.len() - 1..step.tokens.len(),
                LogitRows::All | LogitRows::Verify => 0..step.tokens.len(),
            };
            let mut logits = vec![0.0; rows.len() * VOCAB as usize];
            for (row, at) in logits.chunks_exact_mut(VOCAB as usize).zip(rows) {
                row[self.token(step.tokens[at], past + at) as usize] = 1.0;
            }
            let reads = (past + step.tokens.len()) as u64;
            StepOutput {
                logits: logits.into(),
                kv: KvReads {
                    read: reads,
                    dense: reads,
                },
                ..StepOutput::default()
            }
        });
        outputs.collect()
    }
}

/// A model whose forwards take `cost` and whose tokens are the target's for a share `agreement`.
pub fn model(cost: Cost, agreement: f64) -> Model {
    let shape = ScriptedShape {
        vocab_size: VOCAB as usize,
        max_context: CONTEXT,
        kv_blocks: cost.kv_blocks(),
    };
    Model::scripted(&shape, Box::new(Scripted { cost, agreement }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::cost::{Device, Shape};

    #[test]
    fn a_draft_agrees_on_its_share() {
        let cost = Cost {
            device: Device::H100,
            shape: Shape::LLAMA_3_2_1B,
        };
        for agreement in [0.0, 0.3, 0.8, 1.0] {
            let draft = Scripted { cost, agreement };
            let all = (0..VOCAB).flat_map(|token| (0..500).map(move |position| (token, position)));
            let agreed = all
                .filter(|&(t, p)| draft.token(t, p) == next(t, p))
                .count();
            let share = agreed as f64 / f64::from(VOCAB * 500);
            assert!((share - agreement).abs() < 0.01, "{share} of {agreement}");
        }
    }
}
