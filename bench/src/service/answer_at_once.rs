//! [`AnswerAtOnce`]: a model without compute, so that what is left of a round is the service's own time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use specattn_engine::{AttentionRows, LogitRows, Model, Script, ScriptedShape, Step, StepOutput};

/// Words of the vocabulary: few, since sampling from many is compute.
pub(crate) const VOCAB: usize = 64;

/// Longest context.
pub(crate) const CONTEXT: usize = 1 << 16;

/// Pauses between one answer and the next question, of questions that begin a round.
pub(crate) type Pauses = Arc<Mutex<Vec<Duration>>>;

/// What the model is for.
#[derive(Debug)]
pub(crate) enum Role {
    /// It drafts, and notes its pauses before questions that begin a round.
    Draft(Pauses),
    /// It verifies. Steps alone take their time: a session would be over before its first round.
    Target,
}

/// What a target's step without a draft token takes.
const ALONE: Duration = Duration::from_millis(2);

/// Tokens of the question that begins a round, after one that was accepted whole: its last one and the bonus.
const ROUND_BEGINS: usize = 2;

/// After token t comes t + 1: whoever drafts by it is always right.
#[derive(Debug)]
pub(crate) struct AnswerAtOnce {
    role: Role,
    answered: Option<Instant>,
}

impl AnswerAtOnce {
    /// A model for that.
    pub(crate) fn model(role: Role) -> Model {
        let shape = ScriptedShape {
            vocab_size: VOCAB,
            max_context: CONTEXT,
            kv_blocks: CONTEXT / 16,
        };
        let script = Self {
            role,
            answered: None,
        };
        Model::scripted(&shape, Box::new(script))
    }
}

impl Script for AnswerAtOnce {
    fn answer(&mut self, steps: &[Step<'_>]) -> Vec<StepOutput> {
        let asked = |tokens: usize| steps.iter().all(|step| step.tokens.len() == tokens);
        match (&self.role, self.answered) {
            (Role::Draft(pauses), Some(answered)) if asked(ROUND_BEGINS) => {
                let mut pauses = pauses.lock().unwrap_or_else(PoisonError::into_inner);
                pauses.push(answered.elapsed());
            }
            (Role::Target, _) if asked(1) => std::thread::sleep(ALONE),
            _ => {}
        }
        let outputs = steps.iter().map(answer).collect();
        self.answered = Some(Instant::now());
        outputs
    }
}

/// A step's answer.
pub(crate) fn answer(step: &Step<'_>) -> StepOutput {
    let asked = match step.logits {
        LogitRows::None | LogitRows::Replay => &[],
        LogitRows::Last => &step.tokens[step.tokens.len() - 1..],
        LogitRows::All | LogitRows::Verify => step.tokens,
    };
    let mut logits = vec![0.0; asked.len() * VOCAB];
    for (row, &token) in logits.chunks_exact_mut(VOCAB).zip(asked) {
        row[(token as usize + 1) % VOCAB] = 1.0;
    }
    let kv_len = step.sequence.len() + step.tokens.len();
    let attention = (!step.capture.is_empty()).then(|| AttentionRows {
        layers: step.capture.to_vec(),
        num_heads: 1,
        kv_len,
        probs: probabilities(kv_len).repeat(step.capture.len()),
    });
    StepOutput {
        logits: logits.into(),
        attention,
        ..StepOutput::default()
    }
}

/// A row that puts most of its mass on one position in sixteen, others as the text grows.
fn probabilities(kv_len: usize) -> Vec<f32> {
    let heavy = |position: usize| (position * 7 + kv_len / 4).is_multiple_of(16);
    let mut row: Vec<f32> = (0..kv_len)
        .map(|position| if heavy(position) { 1.0 } else { 0.01 })
        .collect();
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|p| *p /= sum);
    row
}
