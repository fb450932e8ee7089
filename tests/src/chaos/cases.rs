//! [`Case`]: a request whose undisturbed answer is known.

use specattn_proto::v1::FinishReason;
use tonic::transport::Channel;

use crate::client::{Completion, Request};
use crate::texts::references;

/// Tokens asked for, in turn.
const TOKENS: [u32; 3] = [200, 64, 350];

/// A request whose answer is known.
#[derive(Debug, Clone)]
pub struct Case {
    /// What is asked.
    pub request: Request,
    /// For reports.
    pub name: String,
    /// The undisturbed answer; none where masks leave it open.
    expected: Option<Completion>,
}

/// Cases of every kind, answered by the undisturbed fleet behind `channel`.
///
/// Sampled ones have no draft: what is drawn does not depend on time then.
pub async fn cases(channel: &Channel) -> Vec<Case> {
    let mut cases = Vec::new();
    for (index, reference) in references().iter().step_by(3).enumerate() {
        let tokens = TOKENS[index % TOKENS.len()];
        let request = || Request::tokens(&reference.prompt, tokens);
        let sampled = request().draft_length(0).sampled(0.8, index as u64);
        let greedy = Some(answer(request().draft_length(0), channel).await);
        let drawn = Some(answer(sampled.clone(), channel).await);
        for (kind, request, expected) in [
            ("dense with a draft", request().draft_length(4), &greedy),
            ("dense as it pays", request(), &greedy),
            ("exact", request().exact(), &greedy),
            ("sampled", sampled, &drawn),
            ("sparse", request().sparse(0.9), &None),
        ] {
            cases.push(Case {
                request,
                name: format!("{kind}, {} + {tokens}", reference.prompt.len()),
                expected: expected.clone(),
            });
        }
    }
    cases
}

async fn answer(request: Request, channel: &Channel) -> Completion {
    let answer = request.run(channel.clone()).await;
    answer.expect("nothing disturbs the first requests")
}

impl Case {
    /// Whether this is the whole answer; else what is wrong with it.
    pub fn check(&self, completion: &Completion) -> Result<(), String> {
        if completion.reason != Some(FinishReason::Length) {
            return Err(format!(
                "{}: it ended by {:?}",
                self.name, completion.reason
            ));
        }
        self.begins(completion)?;
        match &self.expected {
            Some(expected) if completion.tokens.len() != expected.tokens.len() => Err(format!(
                "{}: {} tokens, not {}",
                self.name,
                completion.tokens.len(),
                expected.tokens.len()
            )),
            Some(expected) if completion.text != expected.text => {
                Err(format!("{}: the same tokens in other text", self.name))
            }
            _ => Ok(()),
        }
    }

    /// Whether the answer begins so; else what is wrong with it.
    pub fn begins(&self, completion: &Completion) -> Result<(), String> {
        let Some(expected) = &self.expected else {
            return Ok(());
        };
        let count = completion.tokens.len();
        let same = completion
            .tokens
            .iter()
            .zip(&expected.tokens)
            .take_while(|(a, b)| a == b);
        let same = same.count();
        if same < count {
            return Err(format!(
                "{}: of {count} tokens the first {same} are as undisturbed",
                self.name
            ));
        }
        if !expected.text.starts_with(&completion.text) {
            return Err(format!("{}: the same tokens in other text", self.name));
        }
        Ok(())
    }
}
