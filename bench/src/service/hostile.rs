//! What a hostile draft worker costs the sessions beside the one it was given.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use specattn_tests::hostile::Hostility;
use specattn_tests::session::open_request;
use specattn_tests::texts::references;
use specattn_tests::{Process, Session, VERIFY};
use tonic::transport::Channel;

use super::timed::median;

/// Tokens of a neighbour.
const NEIGHBOUR: u32 = 120;

/// Tokens of the session with the hostile draft: more than neighbours decode meanwhile.
const HARASSED: u32 = 3_000;

/// A verify worker with a session that decodes and others beside it.
#[derive(Debug)]
pub struct Street {
    verify: Process,
    channel: Channel,
    /// Another connection, as another host would have.
    strangers: Channel,
    prompts: [Vec<u32>; 2],
}

impl Street {
    /// Starts the verify worker.
    pub async fn start() -> Self {
        let line = ["--draft-timeout-ms", "50", "--commit-interval-ms", "0"];
        let verify = Process::worker(VERIFY, &line).await;
        Self {
            channel: verify.channel().await,
            strangers: verify.channel().await,
            verify,
            prompts: [1, 3].map(|index| references()[index].prompt.clone()),
        }
    }

    /// Milliseconds per token of a neighbour: without a draft next door, and with a hostile one; medians of `turns` each,
    /// in turn.
    ///
    /// # Errors
    /// When a session fails, or the hostile draft never joined.
    pub async fn beside(&self, hostility: Hostility, turns: usize) -> Result<(f64, f64)> {
        let (mut without, mut with) = (Vec::new(), Vec::new());
        for _ in 0..turns {
            without.push(self.neighbour(None).await?);
            with.push(self.neighbour(Some(hostility)).await?);
        }
        Ok((median(without), median(with)))
    }

    async fn neighbour(&self, hostility: Option<Hostility>) -> Result<f64> {
        let [prompt, harassed] = &self.prompts;
        let mut request = open_request(harassed, HARASSED);
        request.draft_length = if hostility.is_some() { 4 } else { 0 };
        let mut session = Session::open(self.channel.clone(), request).await?;
        let (strangers, id) = (self.strangers.clone(), session.id().to_owned());
        let known = harassed.clone();
        let hostile = hostility.map(|hostility| {
            tokio::spawn(async move { hostility.harass(strangers, &id, &known).await })
        });
        let reading =
            tokio::spawn(async move { while matches!(session.next().await, Ok(true)) {} });
        let time = self.time_per_token(prompt).await?;
        reading.abort();
        if let Some(hostile) = hostile {
            ensure!(hostile.await? > 0, "{hostility:?} never joined");
        }
        self.verify.is_idle().await;
        Ok(time.as_secs_f64() * 1e3)
    }

    async fn time_per_token(&self, prompt: &[u32]) -> Result<Duration> {
        let mut request = open_request(prompt, NEIGHBOUR);
        request.draft_length = 0;
        let mut session = Session::open(self.channel.clone(), request).await?;
        session.at_least(1).await?;
        let (start, first) = (Instant::now(), session.tokens.len());
        session.finish().await?;
        let timed = u32::try_from(session.tokens.len() - first).context("tokens")?;
        Ok(start.elapsed() / timed.max(1))
    }
}
