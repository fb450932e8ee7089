//! [`Workload`]: who asks what, and when. Session number i follows from the seed and i alone.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use specattn_cli::bench::arrivals::Load;
use specattn_cli::bench::lengths::Lengths;
use specattn_proto::v1::generate_request::Prompt;
use specattn_proto::v1::{DraftPolicy, GenerateRequest, Limits, Mode, Sampling, TokenIds};

use crate::simulate::script::{VOCAB, mixed};

/// Longest prompt and completion.
const MOST: u32 = 32_768;

/// What is asked of a fleet.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Requests per second, or clients that are always busy.
    pub load: Load,
    /// From then on nobody asks any more.
    pub until: Duration,
    /// Tokens of a prompt behind its shared part.
    pub prompt_tokens: Lengths,
    /// Tokens of a completion.
    pub output_tokens: Lengths,
    /// Applications: clients in the gateway's eyes, whose prompts begin with the same tokens.
    pub applications: u32,
    /// How many those are.
    pub shared_tokens: usize,
    /// Most tokens per round; none leaves it to the services, which then use drafts while they pay.
    pub draft_length: Option<u32>,
    /// The key of everything random.
    pub seed: u64,
}

/// A session that is asked for.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Who asks.
    pub client: String,
    /// What.
    pub request: GenerateRequest,
    /// The prompt's last token, and how many there are.
    pub last: (u32, usize),
}

impl Workload {
    /// Session number `index`.
    pub fn asked(&self, index: u64) -> Asked {
        let mut rng = StdRng::seed_from_u64(mixed(self.seed) ^ index);
        let application = rng.random_range(0..self.applications.max(1));
        let mut shared = StdRng::seed_from_u64(!mixed(self.seed) ^ u64::from(application));
        let mut ids: Vec<u32> = (0..self.shared_tokens)
            .map(|_| shared.random_range(0..VOCAB))
            .collect();
        let own = self.prompt_tokens.draw(&mut rng).min(MOST);
        ids.extend((0..own).map(|_| rng.random_range(0..VOCAB)));
        let last = (ids[ids.len() - 1], ids.len());
        let request = GenerateRequest {
            prompt: Some(Prompt::TokenIds(TokenIds { ids })),
            sampling: Some(Sampling {
                seed: Some(index),
                ..Sampling::default()
            }),
            limits: Some(Limits {
                max_tokens: Some(self.output_tokens.draw(&mut rng).min(MOST)),
                ignore_eos: true,
                ..Limits::default()
            }),
            mode: Mode::Dense.into(),
            draft: Some(DraftPolicy {
                draft_length: self.draft_length,
                ..DraftPolicy::default()
            }),
            ..GenerateRequest::default()
        };
        Asked {
            client: format!("application {application}"),
            request,
            last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_follow_from_the_seed_and_share_their_application_s_beginning() {
        let workload = Workload {
            load: Load::Rate(1.0),
            until: Duration::from_secs(1),
            prompt_tokens: Lengths::Uniform(1, 9),
            output_tokens: Lengths::Fixed(3),
            applications: 2,
            shared_tokens: 30,
            draft_length: None,
            seed: 5,
        };
        let prompt = |asked: &Asked| match &asked.request.prompt {
            Some(Prompt::TokenIds(tokens)) => tokens.ids.clone(),
            _ => panic!("no tokens"),
        };
        let all: Vec<Asked> = (0..40).map(|index| workload.asked(index)).collect();
        assert_eq!(prompt(&all[7]), prompt(&workload.asked(7)));
        for a in &all {
            assert!((31..=39).contains(&a.last.1));
            for b in &all {
                let same = prompt(a)[..30] == prompt(b)[..30];
                assert_eq!(same, a.client == b.client);
            }
        }
        let other = Workload {
            seed: 6,
            ..workload
        };
        assert_ne!(prompt(&other.asked(7)), prompt(&all[7]));
    }
}
