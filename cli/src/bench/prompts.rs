//! [`Workload`]: what request number i asks, which follows from the seed and i alone.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use specattn_proto::v1;
use specattn_proto::v1::generate_request::Prompt;

use crate::bench::lengths::Lengths;

/// Where prompts come from.
#[derive(Debug)]
pub enum Source {
    /// Token ids below this number, at random.
    Random(u32),
    /// Stretches of this text, which is not empty; it is read in a circle.
    Text(Vec<u32>),
}

/// Makes requests.
#[derive(Debug)]
pub struct Workload {
    /// How tokens are found; prompt, limits and seed are filled in.
    pub decoding: v1::GenerateRequest,
    /// What prompts are made of.
    pub source: Source,
    /// Tokens per prompt.
    pub prompt_tokens: Lengths,
    /// Tokens per completion.
    pub output_tokens: Lengths,
    /// Longest session in tokens: completions, then prompts are cut to fit in.
    pub max_context: u32,
    /// So many first tokens of all prompts are the same.
    pub shared_prefix: usize,
    /// Whether completions may end before their length.
    pub stop_at_eos: bool,
    /// The key of everything random.
    pub seed: u64,
}

impl Workload {
    /// Request number `index`.
    pub fn request(&self, index: u64) -> v1::GenerateRequest {
        let mut rng = StdRng::seed_from_u64(mixed(self.seed, index));
        let output = self
            .output_tokens
            .draw(&mut rng)
            .min(self.max_context.saturating_sub(1).max(1));
        let room = self.max_context.saturating_sub(output).max(1);
        let length = self.prompt_tokens.draw(&mut rng).min(room) as usize;
        let shared = self.shared_prefix.min(length);
        let mut ids = self.tokens(
            &mut StdRng::seed_from_u64(mixed(self.seed, u64::MAX)),
            shared,
        );
        ids.extend(self.tokens(&mut rng, length - shared));
        let mut request = v1::GenerateRequest {
            prompt: Some(Prompt::TokenIds(v1::TokenIds { ids })),
            limits: Some(v1::Limits {
                max_tokens: Some(output),
                ignore_eos: !self.stop_at_eos,
                ..v1::Limits::default()
            }),
            ..self.decoding.clone()
        };
        if let Some(sampling) = &mut request.sampling {
            sampling.seed = Some(rng.random());
        }
        request
    }

    fn tokens(&self, rng: &mut StdRng, count: usize) -> Vec<u32> {
        match &self.source {
            Source::Random(vocab_size) => (0..count)
                .map(|_| rng.random_range(0..*vocab_size))
                .collect(),
            Source::Text(text) => {
                let start = rng.random_range(0..text.len());
                text.iter()
                    .cycle()
                    .skip(start)
                    .take(count)
                    .copied()
                    .collect()
            }
        }
    }
}

/// A seed of its own for each index.
fn mixed(seed: u64, index: u64) -> u64 {
    // An odd multiplier permutes; StdRng's seeding hashes what comes out.
    seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            decoding: v1::GenerateRequest {
                sampling: Some(v1::Sampling::default()),
                ..v1::GenerateRequest::default()
            },
            source: Source::Text((0..50).collect()),
            prompt_tokens: Lengths::Uniform(20, 80),
            output_tokens: Lengths::Uniform(1, 30),
            max_context: 100,
            shared_prefix: 8,
            stop_at_eos: false,
            seed: 5,
        }
    }

    fn ids(request: &v1::GenerateRequest) -> &[u32] {
        match &request.prompt {
            Some(Prompt::TokenIds(tokens)) => &tokens.ids,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_number_names_a_request() {
        let (a, b) = (workload(), workload());
        assert_eq!(a.request(3), b.request(3));
        assert_ne!(a.request(3), a.request(4));
        let other = Workload {
            seed: 6,
            ..workload()
        };
        assert_ne!(a.request(3), other.request(3));
    }

    #[test]
    fn requests_fit_the_context_and_share_what_they_should() {
        for source in [Source::Random(40), Source::Text((0..50).collect())] {
            let workload = Workload {
                source,
                ..workload()
            };
            let prefix = ids(&workload.request(0))[..8].to_vec();
            let mut tails = std::collections::BTreeSet::new();
            for index in 0..200 {
                let request = workload.request(index);
                let ids = ids(&request);
                let output = request.limits.as_ref().unwrap().max_tokens.unwrap();
                assert!((20..=80).contains(&ids.len()) && ids.len() as u32 + output <= 100);
                assert_eq!(ids[..8], prefix);
                tails.insert(ids[8..12].to_vec());
            }
            assert!(tails.len() > 30);
        }
    }

    #[test]
    fn lengths_beyond_the_context_are_cut() {
        let workload = Workload {
            prompt_tokens: Lengths::Fixed(1_000_000),
            output_tokens: Lengths::Fixed(1_000_000),
            ..workload()
        };
        let request = workload.request(0);
        assert_eq!(ids(&request).len(), 1);
        assert_eq!(request.limits.unwrap().max_tokens, Some(99));
    }
}
