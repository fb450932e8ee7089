//! Sessions on one prompt process it once, whatever its length, in the target and in the draft, and continue it by the target's
//! own greedy text.
#![allow(clippy::unwrap_used)]

use specattn_proto::v1::FinishReason;
use specattn_tests::process::{DRAFT, VERIFY};
use specattn_tests::session::open_request;
use specattn_tests::texts::{self, Reference};
use specattn_tests::{Process, Session};

/// Sessions on each prompt.
const SESSIONS: u64 = 5;

/// The verify worker, then the draft worker.
struct Workers([Process; 2]);

impl Workers {
    async fn start() -> Self {
        // A session's draft has time to attach, and is waited for.
        let flags = [
            "--draft-timeout-ms",
            "30000",
            "--inject-forward-delay-ms",
            "5",
        ];
        Self([
            Process::worker(VERIFY, &flags).await,
            Process::worker(DRAFT, &[]).await,
        ])
    }

    /// Prompt tokens that each worker's sessions have taken over from others since its start.
    async fn taken_over(&self) -> [u64; 2] {
        let [verify, draft] = &self.0;
        [
            verify.load().await.prefix_tokens_total,
            draft.load().await.prefix_tokens_total,
        ]
    }

    /// Runs sessions on a prompt at the same time, each with a draft. Gives the prompt tokens that they say they took over.
    async fn run(&self, Reference { prompt, greedy }: &Reference) -> u64 {
        let [verify, draft] = &self.0;
        let mut sessions = Vec::new();
        let mut told = 0;
        for _ in 0..SESSIONS {
            let request = open_request(prompt, greedy.len() as u32);
            let session = Session::open(verify.channel().await, request);
            let session = session.await.unwrap();
            let attachment = session.attach(draft.channel().await, verify.uri());
            sessions.push((attachment.await.unwrap(), session));
        }
        for (attachment, mut session) in sessions {
            let (reason, stats) = session.finish().await.unwrap();
            assert_eq!(reason, FinishReason::Length);
            assert_eq!(&session.tokens, greedy);
            told += stats.cached_prompt_tokens;
            attachment.detached().await;
        }
        verify.is_idle().await;
        draft.is_idle().await;
        told
    }
}

#[tokio::test]
async fn a_prompt_of_any_length_is_processed_once() {
    let workers = Workers::start().await;
    let references = texts::references();
    let lengths = references.iter().map(|reference| reference.prompt.len());
    println!("prompts of {:?} tokens", lengths.collect::<Vec<_>>());
    for reference in references.iter().step_by(4) {
        let before = workers.taken_over().await;
        let told = workers.run(reference).await;
        let after = workers.taken_over().await;
        // All but the last token, which is each session's first input.
        let shared = reference.prompt.len() as u64 - 1;
        for (before, after) in before.into_iter().zip(after) {
            assert_eq!(after - before, (SESSIONS - 1) * shared);
            assert_eq!(after - before, told);
        }
    }
}
