//! [`Timed`]: a session at a verify worker, from its first tokens to its last.

use std::time::Instant;

use anyhow::{Context, Result};
use specattn_proto::v1::{OpenRequest, SessionStats};
use specattn_tests::{Process, Session};

/// A draft worker, and where it reaches the verify worker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draft<'a> {
    pub(crate) worker: &'a Process,
    pub(crate) endpoint: &'a str,
}

/// What a session came to.
#[derive(Debug)]
pub(crate) struct Timed {
    /// Committed tokens per second, the first ones left out.
    pub(crate) rate: f64,
    /// Those.
    pub(crate) tokens: usize,
    pub(crate) stats: SessionStats,
}

impl Timed {
    /// Runs a session with or without a draft; the clock starts when `skipped` tokens are committed.
    ///
    /// # Errors
    /// Whatever the session or the draft ends with.
    pub(crate) async fn run(
        verify: &Process,
        draft: Option<Draft<'_>>,
        request: OpenRequest,
        skipped: usize,
    ) -> Result<Self> {
        let mut session = Session::open(verify.channel().await, request).await?;
        let mut attachment = None;
        if let Some(draft) = draft {
            let channel = draft.worker.channel().await;
            attachment = Some(session.attach(channel, draft.endpoint).await?);
        }
        session.at_least(skipped).await?;
        let (start, before) = (Instant::now(), session.tokens.len());
        let (_, stats) = session.finish().await.context("the session")?;
        let tokens = session.tokens.len() - before;
        drop(attachment);
        Ok(Self {
            rate: tokens as f64 / start.elapsed().as_secs_f64(),
            tokens,
            stats,
        })
    }
}

/// The middle one.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
