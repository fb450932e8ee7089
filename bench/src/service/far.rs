//! Drafts far from their target: what running ahead of verdicts gains, and what a draft costs that cannot pay.
//!
//! Two delays are injected for what this machine does not have: a [`Link`] between draft and verify worker holds every byte
//! back, each way, and the verify worker's hidden `--inject-forward-delay-ms` lengthens every forward of the target.

use std::time::Duration;

use anyhow::Result;
use specattn_proto::v1::{OpenRequest, Sampling};
use specattn_tests::network::Link;
use specattn_tests::session::open_request;
use specattn_tests::texts::{book, references};
use specattn_tests::{DRAFT, Process, VERIFY};

use super::timed::{Draft, Timed, median};

/// Tokens before the clock starts: the draft has caught up with the prompt and found its pace.
const SKIPPED: usize = 32;

/// How far, how slow, how long.
#[derive(Debug, Clone, Copy)]
pub struct Distance {
    /// What each way between draft and verify worker takes.
    pub one_way: Duration,
    /// What is added to every forward of the slow target.
    pub forward: Duration,
    /// Tokens of a session behind the slow target, and behind the fast one.
    pub slow_tokens: u32,
    /// See above.
    pub fast_tokens: u32,
    /// Sessions per figure of the fast pair.
    pub passes: usize,
}

/// The slow target's texts: one that repeats itself, which the draft guesses well, and sampled prose.
fn texts(tokens: u32) -> [(&'static str, OpenRequest); 2] {
    let greedy = open_request(&references()[2].prompt, tokens);
    [("greedy", greedy), ("sampled", sampled(tokens))]
}

fn sampled(tokens: u32) -> OpenRequest {
    OpenRequest {
        sampling: Some(Sampling {
            temperature: 0.8,
            seed: Some(7),
            ..Sampling::default()
        }),
        ..open_request(&book(500), tokens)
    }
}

impl Distance {
    /// Prints the table of a slow target.
    ///
    /// # Errors
    /// When a session fails.
    pub async fn slow_target(&self) -> Result<()> {
        let ms = self.forward.as_millis().to_string();
        let delays = ["--inject-forward-delay-ms", ms.as_str()];
        let verify = Process::worker(
            VERIFY,
            &[&delays[..], &["--commit-interval-ms", "0"]].concat(),
        )
        .await;
        let far = Link::late(&verify, self.one_way).await;
        println!(
            "A target forward of {} ms (injected); tokens/s on loopback and {} ms (injected) away.\n",
            self.forward.as_millis(),
            self.one_way.as_millis()
        );
        println!(
            "| text | draft length | lookahead | loopback | away | away / loopback | accepted |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- |");
        for (text, request) in texts(self.slow_tokens) {
            for length in ["4", "chosen"] {
                for lookahead in ["off", "on", "auto"] {
                    let draft = Process::worker(DRAFT, &["--lookahead", lookahead]).await;
                    let mut sessions = Vec::new();
                    for endpoint in [verify.uri(), far.uri()] {
                        let worker = &draft;
                        let draft = Some(Draft { worker, endpoint });
                        let request = OpenRequest {
                            session_id: open_request(&[], 0).session_id,
                            draft_while_it_pays: length == "chosen",
                            draft_length: if length == "chosen" { 16 } else { 4 },
                            ..request.clone()
                        };
                        sessions.push(Timed::run(&verify, draft, request, SKIPPED).await?);
                    }
                    let [near, away] = &sessions[..] else {
                        continue;
                    };
                    println!(
                        "| {text} | {length} | {lookahead} | {:.1} | {:.1} | {:.2} | {:.2} |",
                        near.rate,
                        away.rate,
                        away.rate / near.rate,
                        away.acceptance()
                    );
                }
            }
        }
        Ok(())
    }

    /// Prints the table of the plain pair, whose drafts cannot pay over such a way.
    ///
    /// # Errors
    /// When a session fails.
    pub async fn fast_pair(&self) -> Result<()> {
        let verify = Process::worker(VERIFY, &[]).await;
        let draft = Process::worker(DRAFT, &[]).await;
        let far = Link::late(&verify, self.one_way).await;
        let away = Draft {
            worker: &draft,
            endpoint: far.uri(),
        };
        let (mut alone, mut with_draft) = (Vec::new(), Vec::new());
        let mut rounds = 0.0;
        for _ in 0..self.passes {
            let request = |draft_length| OpenRequest {
                draft_length,
                draft_while_it_pays: true,
                ..sampled(self.fast_tokens)
            };
            let without = Timed::run(&verify, None, request(0), SKIPPED).await?;
            alone.push(without.rate);
            let session = Timed::run(&verify, Some(away), request(4), SKIPPED).await?;
            with_draft.push(session.rate);
            let stats = session.stats;
            let judged = stats.target_forwards - stats.solo_forwards;
            rounds += judged as f64 / stats.target_forwards.max(1) as f64;
        }
        println!(
            "The plain pair, sampled, {} tokens; its draft {} ms (injected) away and its use left to the worker.\n",
            self.fast_tokens,
            self.one_way.as_millis()
        );
        println!(
            "| session | without a draft | with it | with / without | rounds among forwards |"
        );
        println!("| --- | --- | --- | --- | --- |");
        let row = |name: &str, without: f64, with: f64, rounds: &str| {
            println!(
                "| {name} | {without:.0} | {with:.0} | {:.3} | {rounds} |",
                with / without
            );
        };
        row("first", alone[0], with_draft[0], "");
        let share = format!("{:.3}", rounds / self.passes as f64);
        row("median", median(alone), median(with_draft), &share);
        Ok(())
    }
}
