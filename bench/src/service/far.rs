//! Drafts far from their target: what running ahead of verdicts gains, and what a draft costs that cannot pay.
//!
//! Two delays are injected for what this machine does not have: a [`Link`] between draft and verify worker holds every byte
//! back, each way, and the verify worker's hidden `--inject-forward-delay-ms` lengthens every forward of the target.

use std::time::Duration;

use anyhow::Result;
use specattn_proto::v1::{OpenRequest, Sampling};
use specattn_tests::network::Link;
use specattn_tests::session::open_request;
use specattn_tests::texts::{book, book_files, middle_of, references};
use specattn_tests::{DRAFT, Process, VERIFY};

use super::timed::{Draft, Timed, median};

/// Tokens before the clock starts: the draft has caught up with the prompt and found its pace.
const SKIPPED: usize = 32;

/// Tokens of a book before the text that is sampled.
const PROMPT: usize = 500;

/// How far, how slow, how long.
#[derive(Debug, Clone)]
pub struct Distance {
    /// What each way between draft and verify worker takes.
    pub one_way: Duration,
    /// What is added to every forward of the slow target.
    pub forward: Duration,
    /// Tokens of a session behind the slow target, and behind the fast one.
    pub slow_tokens: u32,
    /// See above.
    pub fast_tokens: u32,
    /// Sessions per figure of the slow target, each with another text.
    pub slow_passes: usize,
    /// Part of the first columns of the slow target's rows that are wanted.
    pub rows: String,
    /// Sessions per figure of the fast pair.
    pub passes: usize,
}

/// The slow target's texts: some that repeat themselves, which the draft guesses well, and sampled prose.
fn texts(tokens: u32, count: usize) -> [(&'static str, Vec<OpenRequest>); 2] {
    let references = references();
    // From the third on: the first ones end early.
    let greedy = references.iter().cycle().skip(2).take(count);
    let greedy = greedy.map(|reference| open_request(&reference.prompt, tokens));
    let books = book_files();
    let prose = (0..count).map(|index| match books.get(index) {
        Some(book) => sampled(&middle_of(book, PROMPT), 7 + index as u64, tokens),
        None => sampled(&book(PROMPT), 7 + index as u64, tokens),
    });
    [("greedy", greedy.collect()), ("sampled", prose.collect())]
}

fn sampled(prompt: &[u32], seed: u64, tokens: u32) -> OpenRequest {
    OpenRequest {
        sampling: Some(Sampling {
            temperature: 0.8,
            seed: Some(seed),
            ..Sampling::default()
        }),
        ..open_request(prompt, tokens)
    }
}

/// Sessions one after another.
#[derive(Debug, Default)]
struct Together {
    tokens: f64,
    seconds: f64,
    accepted: u64,
    proposed: u64,
    forwards: u64,
    alone: u64,
}

impl Together {
    fn add(&mut self, session: &Timed) {
        self.tokens += session.tokens as f64;
        self.seconds += session.tokens as f64 / session.rate;
        self.accepted += session.stats.accepted_tokens;
        self.proposed += session.stats.proposed_tokens;
        self.forwards += session.stats.target_forwards;
        self.alone += session.stats.solo_forwards;
    }

    fn rate(&self) -> f64 {
        self.tokens / self.seconds
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
            "| text | draft length | lookahead | loopback | away | away / loopback | away / waiting | accepted | forwards alone |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for (text, requests) in texts(self.slow_tokens, self.slow_passes) {
            for length in ["4", "chosen"] {
                let mut waiting = None;
                for lookahead in ["off", "on", "unawaited", "auto"] {
                    if !format!("{text} {length} {lookahead}").contains(&self.rows) {
                        continue;
                    }
                    let draft = Process::worker(DRAFT, &["--lookahead", lookahead]).await;
                    let mut figures = [Together::default(), Together::default()];
                    // The way stays the same from session to session, as it would.
                    for (endpoint, figures) in
                        [verify.uri(), far.uri()].into_iter().zip(&mut figures)
                    {
                        for request in &requests {
                            let worker = &draft;
                            let draft = Some(Draft { worker, endpoint });
                            let request = OpenRequest {
                                session_id: open_request(&[], 0).session_id,
                                draft_while_it_pays: length == "chosen",
                                draft_length: if length == "chosen" { 16 } else { 4 },
                                ..request.clone()
                            };
                            figures.add(&Timed::run(&verify, draft, request, SKIPPED).await?);
                        }
                    }
                    let [near, away] = figures;
                    if lookahead == "off" {
                        waiting = Some(away.rate());
                    }
                    println!(
                        "| {text} | {length} | {lookahead} | {:.1} | {:.1} | {:.2} | {} | {:.2} | {:.2} |",
                        near.rate(),
                        away.rate(),
                        away.rate() / near.rate(),
                        waiting.map_or_else(String::new, |waiting| format!(
                            "{:.2}",
                            away.rate() / waiting
                        )),
                        away.accepted as f64 / away.proposed.max(1) as f64,
                        away.alone as f64 / away.forwards.max(1) as f64,
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
        let prompt = book(PROMPT);
        let (mut alone, mut with_draft) = (Vec::new(), Vec::new());
        let mut rounds = 0.0;
        for _ in 0..self.passes {
            let request = |draft_length| OpenRequest {
                draft_length,
                draft_while_it_pays: true,
                ..sampled(&prompt, 7, self.fast_tokens)
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
