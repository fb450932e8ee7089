//! [`Session`]: one request, from Opened to the end of the client's stream.
//!
//! The verify worker's event stream is the source of truth. The session follows it, writes the log, turns tokens into
//! text and hands both to the client; it asks the worker to stop for a cancel, a deadline or a stop string, and still
//! waits for the worker's last word, which brings the statistics. Dropping the event stream frees everything there.

use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{
    CloseRequest, Committed, Delta, FinishReason, Finished, OpenResponse, Provisional,
    ProvisionalDelta, SessionFinished, SessionStats,
};
use specattn_proto::{Fault, SessionId};
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::attachment::Attachment;
use crate::completion::Completion;
use crate::delivery::Delivery;
use crate::opening::OpenSession;
use crate::registry::Assignment;
use crate::session_table::{SessionEntry, SessionSlot};

/// What a verify worker gets to end a session that it was asked to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A running session.
pub(crate) struct Session {
    slot: SessionSlot,
    verify: Verify,
    completion: Completion,
    client: Delivery,
    prompt_tokens: usize,
    /// Length of the log at which the verify worker must have ended the session.
    max_tokens_total: usize,
    deadline: Option<Instant>,
    /// Arrival to the first committed token.
    first_token: Option<Duration>,
    /// Completion tokens handed to the client.
    delivered: u64,
    /// Set once a stop string completed: nothing after it counts.
    stop: Option<String>,
    /// Set once the worker was asked to close: when to stop waiting for it, and why it was asked.
    closing: Option<(Instant, FinishReason)>,
}

/// The session's side of its verify worker.
struct Verify {
    client: VerifyServiceClient<Channel>,
    events: Streaming<OpenResponse>,
    worker: String,
    _assignment: Assignment,
}

/// How a session ended.
enum End {
    Finished(SessionFinished),
    Failed(Fault),
    ClientGone,
    ClientStalled,
}

impl Session {
    /// A session over `open`, whose log holds the prompt.
    pub(crate) fn new(
        slot: SessionSlot,
        open: OpenSession,
        completion: Completion,
        client: Delivery,
        max_tokens_total: usize,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            prompt_tokens: slot.entry.len(),
            verify: Verify {
                client: open.client,
                events: open.events,
                worker: open.worker.id.to_string(),
                _assignment: open.assignment,
            },
            slot,
            completion,
            client,
            max_tokens_total,
            deadline,
            first_token: None,
            delivered: 0,
            stop: None,
            closing: None,
        }
    }

    /// Runs to the end, with `drafting` for as long as the verify worker has not ended the session.
    pub(crate) async fn run(mut self, drafting: Option<Attachment>) {
        let drafting = async {
            match drafting {
                Some(attachment) => attachment.keep().await,
                None => std::future::pending().await,
            }
        };
        let end = tokio::select! {
            end = self.follow() => end,
            never = drafting => match never {},
        };
        match end {
            End::Finished(last) => self.finish(last).await,
            End::Failed(fault) => {
                tracing::warn!(code = fault.label(), %fault, "session failed");
                self.client.fail(fault).await;
            }
            End::ClientGone => tracing::info!(tokens = self.delivered, "the client left"),
            End::ClientStalled => self.client.give_up(),
        }
    }

    /// Follows the verify worker's events until there is nothing more to follow.
    async fn follow(&mut self) -> End {
        let entry = Arc::clone(&self.slot.entry);
        let client = self.client.watch();
        loop {
            let asked = self.closing.is_some();
            let give_up = self.closing.as_ref().map(|(until, _)| *until);
            let stalled = self.client.stall_deadline();
            tokio::select! {
                biased;
                () = client.closed() => return End::ClientGone,
                () = entry.cancel.cancelled(), if !asked => self.close(FinishReason::Cancelled),
                () = at(self.deadline), if !asked => self.close(FinishReason::Deadline),
                () = at(stalled) => return End::ClientStalled,
                () = self.client.flush() => {}
                event = self.verify.events.message() => {
                    if let Some(end) = self.take(event) {
                        return end;
                    }
                }
                () = at(give_up) => {
                    tracing::warn!(worker = self.verify.worker, "no word of the session's end");
                    return End::Finished(self.unheard());
                }
            }
        }
    }

    /// Takes one event; tells when it was the last.
    fn take(&mut self, event: Result<Option<OpenResponse>, tonic::Status>) -> Option<End> {
        let response = match event {
            Ok(Some(response)) => response,
            // Once it was asked to close, all that is missing are the statistics.
            Ok(None) | Err(_) if self.closing.is_some() => {
                return Some(End::Finished(self.unheard()));
            }
            Ok(None) => {
                let text = format!("{} ended the session without a word", self.verify.worker);
                return Some(End::Failed(Fault::Unavailable(text)));
            }
            Err(status) => return Some(End::Failed(Fault::from_status(&status))),
        };
        match response.event {
            Some(Event::Committed(committed)) => self.commit(committed).err().map(End::Failed),
            Some(Event::Finished(finished)) => Some(End::Finished(finished)),
            Some(Event::Provisional(ahead)) => self.look_ahead(ahead).err().map(End::Failed),
            Some(Event::RolledBack(back)) if back.to >= self.slot.entry.len() as u64 => {
                self.client.withdraw(back.to - self.prompt_tokens as u64);
                None
            }
            Some(Event::RolledBack(_)) => Some(self.broken("withdrew committed tokens")),
            Some(Event::Opened(_)) => Some(self.broken("opened the session twice")),
            // An event of a later version.
            None => None,
        }
    }

    fn broken(&self, what: &str) -> End {
        End::Failed(Fault::Internal(format!("{} {what}", self.verify.worker)))
    }

    /// Takes committed tokens: log, text, client.
    fn commit(&mut self, committed: Committed) -> Result<(), Fault> {
        // After a stop string the session is being closed: what was committed meanwhile is nobody's.
        if self.stop.is_some() {
            return Ok(());
        }
        let entry: &SessionEntry = &self.slot.entry;
        let len = entry.len();
        let count = committed.token_ids.len();
        let with_logprobs = committed.logprobs.len() == count;
        if committed.start != len as u64
            || count > self.max_tokens_total.saturating_sub(len)
            || !(with_logprobs || committed.logprobs.is_empty())
        {
            return Err(Fault::Internal(format!(
                "{} committed {count} tokens at {} with {} log-probabilities; the session holds {len} of {}",
                self.verify.worker,
                committed.start,
                committed.logprobs.len(),
                self.max_tokens_total,
            )));
        }
        if count == 0 {
            return Ok(());
        }
        if self.first_token.is_none() {
            self.first_token = Some(entry.arrival.elapsed());
        }
        let mut delta = Delta {
            start: self.delivered,
            token_ids: committed.token_ids,
            text: String::new(),
            logprobs: committed.logprobs,
        };
        for index in 0..count {
            let scan = self.completion.push(delta.token_ids[index])?;
            delta.text.push_str(&scan.text);
            if scan.stop.is_some() {
                delta.token_ids.truncate(index + 1);
                delta.logprobs.truncate(index + 1);
                self.stop = scan.stop;
                break;
            }
        }
        entry.commit(&delta.token_ids);
        self.delivered += delta.token_ids.len() as u64;
        self.client.add(delta);
        if self.stop.is_some() {
            self.close(FinishReason::Stop);
        }
        Ok(())
    }

    /// Shows the client what is provisional. The verify worker tells only of what the client asked for.
    fn look_ahead(&mut self, ahead: Provisional) -> Result<(), Fault> {
        if self.stop.is_some() {
            return Ok(());
        }
        let len = self.slot.entry.len();
        let count = ahead.token_ids.len();
        if ahead.start != len as u64 || count > self.max_tokens_total.saturating_sub(len) {
            return Err(Fault::Internal(format!(
                "{} holds {count} provisional tokens at {}; the session holds {len} of {}",
                self.verify.worker, ahead.start, self.max_tokens_total,
            )));
        }
        let text = self.completion.preview(&ahead.token_ids)?;
        self.client.look_ahead(ProvisionalDelta {
            start: self.delivered,
            token_ids: ahead.token_ids,
            text,
        });
        Ok(())
    }

    /// Asks the verify worker to end the session; its events tell when it has.
    fn close(&mut self, reason: FinishReason) {
        let until = Instant::now() + CLOSE_TIMEOUT;
        self.closing = Some((until, reason));
        let close = close(
            self.verify.client.clone(),
            self.slot.entry.id,
            reason,
            self.verify.worker.clone(),
        );
        tokio::spawn(tokio::time::timeout_at(until, close));
    }

    /// The end of a session that was asked to close and whose worker did not answer: counters are unknown.
    fn unheard(&self) -> SessionFinished {
        let reason = self
            .closing
            .map_or(FinishReason::Error, |(_, reason)| reason);
        SessionFinished {
            reason: reason.into(),
            stats: None,
        }
    }

    /// Tells the client of the end.
    async fn finish(mut self, last: SessionFinished) {
        let mut reason = FinishReason::try_from(last.reason).unwrap_or(FinishReason::Error);
        if self.stop.is_none() {
            match self.completion.finish() {
                Ok(scan) => {
                    self.stop = scan.stop;
                    if !scan.text.is_empty() {
                        self.client.add(Delta {
                            start: self.delivered,
                            text: scan.text,
                            ..Delta::default()
                        });
                    }
                }
                Err(fault) => return self.client.fail(fault).await,
            }
        }
        if self.stop.is_some() {
            reason = FinishReason::Stop;
        }
        let elapsed = self.slot.entry.arrival.elapsed();
        let stats = SessionStats {
            completion_tokens: self.delivered,
            prompt_tokens: self.prompt_tokens as u64,
            ..last.stats.unwrap_or_default()
        };
        tracing::info!(
            reason = reason.as_str_name(),
            completion_tokens = stats.completion_tokens,
            target_forwards = stats.target_forwards,
            proposed_tokens = stats.proposed_tokens,
            accepted_tokens = stats.accepted_tokens,
            elapsed_ms = elapsed.as_millis(),
            "session finished"
        );
        let finished = Finished {
            reason: reason.into(),
            stats: Some(stats),
            ttft_seconds: self.first_token.unwrap_or_default().as_secs_f64(),
            elapsed_seconds: elapsed.as_secs_f64(),
            stop: self.stop.unwrap_or_default(),
        };
        // The place is free from here on: a client that starts its next request at the end finds room.
        drop(self.slot);
        drop(self.verify);
        self.client.finish(finished).await;
    }
}

/// Sleeps until `instant`; for ever when there is none.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn close(
    mut client: VerifyServiceClient<Channel>,
    id: SessionId,
    reason: FinishReason,
    worker: String,
) {
    let request = CloseRequest {
        session_id: id.to_string(),
        reason: reason.into(),
    };
    match client.close(request).await {
        Ok(_) => {}
        Err(status) => match Fault::from_status(&status) {
            // It ended by itself meanwhile.
            Fault::NotFound(_) => {}
            fault => tracing::warn!(session_id = %id, worker, %fault, "closing the session failed"),
        },
    }
}
