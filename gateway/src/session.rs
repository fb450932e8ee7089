//! [`Session`]: one request, from Opened to its end, wherever it runs.
//!
//! The verify worker's event stream is the source of truth. The session follows it: committed tokens go to the log, then
//! into the transcript, from which the client's stream reads. It asks the worker to stop for a cancel, a deadline or a stop
//! string, and still waits for the worker's last word, which brings the statistics. Dropping the event stream frees
//! everything there. When the worker is lost, the session is opened at another one with the tokens so far, and goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::{FinishReason, Finished, LoggedEnd, OpenResponse, SessionFinished};
use tokio::time::Instant;

use crate::Gateway;
use crate::attachment::Attachment;
use crate::completion::Completion;
use crate::log::SessionWriter;
use crate::metrics;
use crate::opening::{OpenSession, Opening};
use crate::pass::Pass;
use crate::recipe::{Recipe, unix_ms};
use crate::registry::{Prefix, WorkerId};
use crate::session_table::SessionSlot;
use crate::tally::Tally;
use crate::transcript::Transcript;
use crate::verify_link::{VerifyLink, unheard};

mod committing;

/// Workers lost in a row, without a token committed in between, after which it is the session's own fault.
pub(crate) const FRUITLESS_REOPENINGS: u32 = 8;

/// Least time between two records of a session's statistics.
const STATS_INTERVAL: Duration = Duration::from_secs(1);

/// A running session.
pub(crate) struct Session {
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) slot: SessionSlot,
    pub(crate) pass: Pass,
    pub(crate) recipe: Recipe,
    pub(crate) transcript: Arc<Transcript>,
    pub(crate) completion: Completion,
    /// `None` without a log.
    pub(crate) writer: Option<SessionWriter>,
    pub(crate) tally: Tally,
    /// Arrival to the first committed token.
    pub(crate) first_token: Option<Duration>,
    /// Set once a stop string completed: nothing after it counts.
    pub(crate) stop: Option<String>,
    pub(crate) times: Times,
    /// Workers that broke the protocol.
    pub(crate) barred: BTreeSet<WorkerId>,
    /// Workers lost since the last committed token.
    pub(crate) fruitless: u32,
}

/// When a session began and must end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) arrival: std::time::Instant,
    pub(crate) deadline: Option<Instant>,
    /// When statistics were logged last.
    stats_logged: Option<std::time::Instant>,
    /// When tokens were committed last.
    committed: Option<std::time::Instant>,
}

impl Times {
    /// Those of a recipe.
    pub(crate) fn of(recipe: &Recipe) -> Self {
        let now = std::time::Instant::now();
        Self {
            arrival: now.checked_sub(recipe.age()).unwrap_or(now),
            deadline: recipe.deadline().map(|after| Instant::now() + after),
            stats_logged: None,
            committed: None,
        }
    }
}

/// How a session's stay at a worker ended.
enum Stay {
    /// So did the session.
    Over(End),
    /// The worker is gone, or has failed.
    Lost(Fault),
    /// The worker cannot be trusted with this session.
    Broken(Fault),
}

/// How a session ended.
enum End {
    Finished(Box<SessionFinished>),
    Failed(Fault),
    /// Nobody has listened for long enough.
    Abandoned,
}

impl Session {
    /// Runs to the end, first at the worker that opened it.
    pub(crate) async fn run(mut self, open: OpenSession) {
        let mut verify = VerifyLink::from(open);
        let end = loop {
            let fault = match self.stay(&mut verify).await {
                Stay::Over(end) => break end,
                Stay::Broken(fault) => {
                    tracing::warn!(verify_worker = %verify.worker.id, %fault, "verify worker is not to be trusted");
                    self.barred.insert(verify.worker.id);
                    fault
                }
                Stay::Lost(fault) => {
                    if matches!(fault, Fault::Unavailable(_)) {
                        self.gateway.registry.suspect(verify.worker.id);
                    }
                    fault
                }
            };
            drop(verify);
            match self.reopen(fault).await {
                Ok(open) => {
                    self.gateway.metrics.reopened();
                    verify = VerifyLink::from(open);
                }
                Err(end) => break end,
            }
        };
        match end {
            End::Finished(last) => self.finish(*last).await,
            End::Failed(fault) => {
                tracing::warn!(code = fault.label(), %fault, "session failed");
                self.gateway.metrics.ended(fault.label());
                self.leave(Err(fault));
            }
            End::Abandoned => {
                let tokens = self.transcript.committed();
                let resumable = self.writer.is_some();
                tracing::info!(tokens, resumable, "the client left");
                self.gateway.metrics.ended(metrics::ABANDONED);
                // A client that comes back at this very moment tries again.
                let text = "the session was left by its client".to_owned();
                self.leave(Err(Fault::Unavailable(text)));
            }
        }
    }

    /// Stays at a worker for as long as that is possible, with a draft while there is one.
    async fn stay(&mut self, verify: &mut VerifyLink) -> Stay {
        self.slot.entry.set_verify_worker(verify.worker.id);
        let attachment = self.recipe.drafting().map(|policy| Attachment {
            entry: Arc::clone(&self.slot.entry),
            transcript: Arc::clone(&self.transcript),
            registry: Arc::clone(&self.gateway.registry),
            verify: verify.worker.clone(),
            capability: verify.capability.clone(),
            policy,
            max_tokens_total: self.recipe.max_tokens_total() as u64,
        });
        let drafting = async {
            match attachment {
                Some(attachment) => attachment.keep().await,
                None => std::future::pending().await,
            }
        };
        let stay = tokio::select! {
            stay = self.follow(verify) => stay,
            never = drafting => match never {},
        };
        self.slot.entry.set_draft_worker(None);
        stay
    }

    /// Follows the verify worker's events until there is nothing more to follow.
    async fn follow(&mut self, verify: &mut VerifyLink) -> Stay {
        let entry = Arc::clone(&self.slot.entry);
        let absent = entry.abandoned();
        tokio::pin!(absent);
        loop {
            let asked = verify.closing.is_some();
            let give_up = verify.closing.as_ref().map(|(until, _)| *until);
            tokio::select! {
                biased;
                () = &mut absent => return Stay::Over(End::Abandoned),
                () = entry.cancel.cancelled(), if !asked => {
                    verify.close(entry.id, FinishReason::Cancelled);
                }
                () = at(self.times.deadline), if !asked => {
                    verify.close(entry.id, FinishReason::Deadline);
                }
                event = verify.events.message() => {
                    if let Some(stay) = self.take(verify, event).await {
                        return stay;
                    }
                }
                () = at(give_up) => {
                    tracing::warn!(verify_worker = %verify.worker.id, "no word of the session's end");
                    return Stay::Over(End::Finished(Box::new(verify.unheard())));
                }
            }
        }
    }

    /// Takes one event; tells when it was the last.
    async fn take(
        &mut self,
        verify: &mut VerifyLink,
        event: Result<Option<OpenResponse>, tonic::Status>,
    ) -> Option<Stay> {
        let response = match event {
            Ok(Some(response)) => response,
            // Once it was asked to close, all that is missing are the statistics.
            Ok(None) | Err(_) if verify.closing.is_some() => {
                return Some(Stay::Over(End::Finished(Box::new(verify.unheard()))));
            }
            Ok(None) => {
                let text = format!("{} ended the session without a word", verify.worker.id);
                return Some(Stay::Lost(Fault::Unavailable(text)));
            }
            Err(status) => return Some(Stay::Lost(Fault::from_status(&status))),
        };
        let broken = |what: &str| {
            let text = format!("{} {what}", verify.worker.id);
            Some(Stay::Broken(Fault::Internal(text)))
        };
        match response.event {
            Some(Event::Committed(committed)) => self.commit(verify, committed).await.err(),
            Some(Event::Finished(finished)) => self.ended(finished),
            Some(Event::Provisional(ahead)) => self.look_ahead(ahead).err(),
            Some(Event::RolledBack(back)) if back.to >= self.transcript.len() as u64 => {
                // A length within the session's.
                self.transcript
                    .withdraw(back.to as usize - self.recipe.prompt().len());
                None
            }
            Some(Event::RolledBack(_)) => broken("withdrew committed tokens"),
            Some(Event::Opened(_)) => broken("opened the session twice"),
            // An event of a later version.
            None => None,
        }
    }

    /// The worker says that the session is over. It may only have lost heart: then another one goes on.
    fn ended(&mut self, finished: SessionFinished) -> Option<Stay> {
        if finished.reason() == FinishReason::Error && self.stop.is_none() {
            self.tally.told(finished.stats.unwrap_or_default());
            let text = "the verify worker gave the session up".to_owned();
            return Some(Stay::Lost(Fault::Unavailable(text)));
        }
        Some(Stay::Over(End::Finished(Box::new(finished))))
    }

    /// Opens the session again, after its worker was lost for this reason.
    async fn reopen(&mut self, lost: Fault) -> Result<OpenSession, End> {
        self.tally.reopened();
        // What was provisional there is nowhere now.
        self.transcript.withdraw(0);
        self.fruitless += 1;
        if self.fruitless > FRUITLESS_REOPENINGS {
            return Err(End::Failed(lost));
        }
        let tokens = self.transcript.tokens();
        tracing::warn!(fault = %lost, tokens = tokens.len(), "verify worker lost: the session goes on elsewhere");
        let prefix = Prefix::of(&tokens);
        let config = &self.gateway.config;
        let opening = Opening {
            registry: &self.gateway.registry,
            request: &|model| {
                self.recipe.fits(model)?;
                Ok(self.recipe.open_request(tokens.clone()))
            },
            prefix,
            barred: &self.barred,
            patience: Instant::now() + config.reopen_timeout,
            // Where a worker broke the protocol and no other is there, waiting is no use.
            waits_for_workers: matches!(lost, Fault::Unavailable(_)),
        };
        let entry = &self.slot.entry;
        tokio::select! {
            open = opening.open() => open.map_err(|fault| End::Failed(match lost {
                Fault::Unavailable(lost) => Fault::Unavailable(format!(
                    "the verify worker was lost ({lost}), and no other took the session: {fault}"
                )),
                lost => lost,
            })),
            () = entry.cancel.cancelled() => Err(End::Finished(Box::new(unheard(FinishReason::Cancelled)))),
            () = at(self.times.deadline) => Err(End::Finished(Box::new(unheard(FinishReason::Deadline)))),
            () = entry.abandoned() => Err(End::Abandoned),
        }
    }

    /// The session ended well.
    async fn finish(mut self, last: SessionFinished) {
        if let Some(stats) = last.stats {
            self.tally.told(stats);
        }
        let mut reason = FinishReason::try_from(last.reason).unwrap_or(FinishReason::Error);
        let tail = match conclude(&mut self.completion, &mut self.stop) {
            Ok(tail) => tail,
            Err(fault) => return self.leave(Err(fault)),
        };
        if self.stop.is_some() {
            reason = FinishReason::Stop;
        }
        let elapsed = self.times.arrival.elapsed();
        self.gateway.metrics.finished(reason, elapsed);
        let mut stats = self.tally.total();
        stats.completion_tokens = self.transcript.committed() as u64;
        stats.prompt_tokens = self.recipe.prompt().len() as u64;
        tracing::info!(
            reason = reason.as_str_name(),
            completion_tokens = stats.completion_tokens,
            target_forwards = stats.target_forwards,
            proposed_tokens = stats.proposed_tokens,
            accepted_tokens = stats.accepted_tokens,
            elapsed_ms = elapsed.as_millis(),
            "session finished"
        );
        let end = LoggedEnd {
            reason: reason.into(),
            stats: Some(stats),
            stop: self.stop.take().unwrap_or_default(),
            elapsed_us: micros(elapsed),
            ended_unix_ms: unix_ms(),
        };
        let finished = finished(&end, self.first_token);
        if let Some(writer) = &self.writer
            && let Err(fault) = writer.end(end).await
        {
            // All tokens are logged: whoever resumes finds the end again.
            tracing::warn!(%fault, "the session's end is not logged");
        }
        self.transcript_end(&tail, Ok(finished));
    }

    /// Ends the session without an end of its own: one that is logged can be continued.
    fn leave(self, end: Result<Finished, Fault>) {
        self.transcript_end("", end);
    }

    fn transcript_end(self, tail: &str, end: Result<Finished, Fault>) {
        // The place is free from here on: a client that starts its next request at the end finds room.
        drop(self.slot);
        drop(self.pass);
        drop(self.writer);
        self.transcript.end(tail, end);
    }
}

/// The text held back until the end. A stop string may complete in it.
pub(crate) fn conclude(
    completion: &mut Completion,
    stop: &mut Option<String>,
) -> Result<String, Fault> {
    if stop.is_some() {
        return Ok(String::new());
    }
    let scan = completion.finish()?;
    *stop = scan.stop;
    Ok(scan.text)
}

/// What a client is told of a logged end.
pub(crate) fn finished(end: &LoggedEnd, first_token: Option<Duration>) -> Finished {
    Finished {
        reason: end.reason,
        stats: end.stats,
        ttft_seconds: first_token.unwrap_or_default().as_secs_f64(),
        elapsed_seconds: Duration::from_micros(end.elapsed_us).as_secs_f64(),
        stop: end.stop.clone(),
    }
}

pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Sleeps until `instant`; for ever when there is none.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
