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
    /// The target's.
    pub target: Tokens,
    /// The draft's.
    pub draft: Tokens,
}

/// Tokens of all sessions on one side.
#[derive(Debug, Clone, Copy)]
pub struct Tokens {
    /// Processed, generated ones included.
    pub processed: u64,
    /// Taken over from others' prompts.
    pub taken_over: u64,
}

impl Tokens {
    /// Between two reports.
    fn between(before: &WorkerLoad, after: &WorkerLoad) -> Self {
        Self {
            processed: after.tokens_total - before.tokens_total,
            taken_over: after.prefix_tokens_total - before.prefix_tokens_total,
        }
    }
}

/// Runs a session on a prompt of `prompt` tokens, then `others` more at the same time.
///
/// # Errors
/// When a session fails, or there is no text of that length.
pub async fn sessions_on(prompt: usize, others: usize) -> Result<Shared> {
    let cluster = Cluster::start(1).await;
    let mut text = book(2 * prompt);
    let enough = text.len() == 2 * prompt && prompt > 0 && others > 0;
    ensure!(enough, "nothing to measure");
    // Weights and KV memory are touched and connections made, by the same on another prompt.
    let prompt = text.split_off(prompt);
    first_and_others(&cluster, text, others).await?;
    let (target, draft) = (cluster.verify.load().await, cluster.drafts[0].load().await);
    let (first, others) = first_and_others(&cluster, prompt, others).await?;
    Ok(Shared {
        first,
        others,
        target: Tokens::between(&target, &cluster.verify.load().await),
        draft: Tokens::between(&draft, &cluster.drafts[0].load().await),
    })
}

/// A session on `prompt`, then `others` more at the same time: how long their first tokens took, the others' shortest first.
async fn first_and_others(
    cluster: &Cluster,
    prompt: Vec<u32>,
    others: usize,
) -> Result<(Duration, Vec<Duration>)> {
    let first = first_token_of(cluster.channel().await, prompt.clone()).await?;
    let mut sessions = JoinSet::new();
    for _ in 0..others {
        sessions.spawn(first_token_of(cluster.channel().await, prompt.clone()));
    }
    let mut times = Vec::new();
    while let Some(session) = sessions.join_next().await {
        times.push(session??);
    }
    times.sort_unstable();
    Ok((first, times))
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
