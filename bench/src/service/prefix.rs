//! Many sessions on one prompt: how often it is processed, and when their first tokens come.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use specattn_proto::v1::WorkerLoad;
use specattn_tests::texts::book;
use specattn_tests::{Cluster, Request};
use tokio::task::JoinSet;

/// Tokens that a session generates.
const TOKENS: u32 = 16;

/// Drafted per round.
const DRAFT_LENGTH: u32 = 4;

/// What sessions on one prompt came to.
#[derive(Debug)]
pub struct Shared {
    /// From request to first token, of the session that came first.
    pub first: Duration,
    /// The same of those that came at once after it, shortest first.
    pub others: Vec<Duration>,
    /// The target's load afterwards.
    pub target: WorkerLoad,
    /// The draft's.
    pub draft: WorkerLoad,
}

/// Runs a session on a prompt of `prompt` tokens, then `others` more at the same time.
///
/// # Errors
/// When a session fails, or there is no text of that length.
pub async fn sessions_on(prompt: usize, others: usize) -> Result<Shared> {
    let cluster = Cluster::start(1).await;
    let prompt = book(prompt);
    ensure!(!prompt.is_empty() && others > 0, "nothing to measure");
    // Weights are touched and connections made.
    first_token(&cluster, prompt[..64].to_vec()).await?;
    let first = first_token(&cluster, prompt.clone()).await?;
    let mut sessions = JoinSet::new();
    for _ in 0..others {
        sessions.spawn(first_token_of(cluster.channel().await, prompt.clone()));
    }
    let mut times = Vec::new();
    while let Some(session) = sessions.join_next().await {
        times.push(session??);
    }
    times.sort_unstable();
    Ok(Shared {
        first,
        others: times,
        target: cluster.verify.load().await,
        draft: cluster.drafts[0].load().await,
    })
}

async fn first_token(cluster: &Cluster, prompt: Vec<u32>) -> Result<Duration> {
    first_token_of(cluster.channel().await, prompt).await
}

/// Runs a session; how long its first token took.
async fn first_token_of(channel: tonic::transport::Channel, prompt: Vec<u32>) -> Result<Duration> {
    let begin = Instant::now();
    let request = Request::tokens(&prompt, TOKENS).draft_length(DRAFT_LENGTH);
    let mut stream = request.start(channel).await?;
    stream.at_least(1).await?;
    let first = begin.elapsed();
    stream.finish().await?;
    Ok(first)
}
