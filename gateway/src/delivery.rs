//! [`Delivery`]: the way to one client.
//!
//! Messages in flight are bounded. What a slow client has not taken is merged into one pending [`Delta`], which the
//! session's own length bounds, so that the verify worker never waits for a client. A client that takes nothing for too
//! long is given up.

use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{Delta, Finished, GenerateResponse, ProvisionalDelta, Started};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::Status;

use crate::preview::Preview;

/// Messages that may wait for the client's connection.
const BUFFERED_MESSAGES: usize = 16;

type Message = Result<GenerateResponse, Status>;

/// The client's stream, as the server reads it.
pub(crate) type ClientStream = tokio_stream::wrappers::ReceiverStream<Message>;

/// A client's stream and what it has yet to take.
pub(crate) struct Delivery {
    sender: mpsc::Sender<Message>,
    /// A place kept for the stream's last message, so that even a client that reads late learns how it ended.
    last: mpsc::OwnedPermit<Message>,
    pending: Option<Delta>,
    preview: Preview,
    /// When something was last taken, or nothing was pending.
    progress: Instant,
    stall_timeout: Duration,
}

impl Delivery {
    /// A stream that begins with `started`.
    pub(crate) fn new(started: Started, stall_timeout: Duration) -> (Self, ClientStream) {
        let (sender, receiver) = mpsc::channel(BUFFERED_MESSAGES + 1);
        let last = sender
            .clone()
            .try_reserve_owned()
            .expect("a fresh channel has room");
        sender
            .try_send(Ok(response(Event::Started(started))))
            .expect("a fresh channel has room");
        let delivery = Self {
            sender,
            last,
            pending: None,
            preview: Preview::default(),
            progress: Instant::now(),
            stall_timeout,
        };
        (delivery, ClientStream::new(receiver))
    }

    /// Adds to what the client is to take next. `delta` follows on what was added before.
    pub(crate) fn add(&mut self, delta: Delta) {
        self.begin_progress();
        self.preview.clear();
        match &mut self.pending {
            Some(pending) => {
                pending.token_ids.extend(delta.token_ids);
                pending.text.push_str(&delta.text);
                pending.logprobs.extend(delta.logprobs);
            }
            None => self.pending = Some(delta),
        }
    }

    /// Shows the client what is provisional now.
    pub(crate) fn look_ahead(&mut self, delta: ProvisionalDelta) {
        self.begin_progress();
        self.preview.set(delta);
    }

    /// Withdraws what the client was shown from completion token `to` on.
    pub(crate) fn withdraw(&mut self, to: u64) {
        self.begin_progress();
        self.preview.withdraw(to);
    }

    fn begin_progress(&mut self) {
        if !self.is_pending() {
            self.progress = Instant::now();
        }
    }

    fn is_pending(&self) -> bool {
        self.pending.is_some() || self.preview.is_pending()
    }

    fn next(&mut self) -> Option<Event> {
        if let Some(withdrawn) = self.preview.take_withdrawn() {
            return Some(withdrawn);
        }
        if let Some(delta) = self.pending.take() {
            self.preview.committed(&delta);
            return Some(Event::Delta(delta));
        }
        self.preview.take()
    }

    /// Hands over what is pending as soon as there is room; never ends while nothing is. Safe to drop at any time.
    pub(crate) async fn flush(&mut self) {
        if !self.is_pending() {
            return std::future::pending().await;
        }
        match self.sender.clone().reserve().await {
            Ok(permit) => {
                if let Some(event) = self.next() {
                    permit.send(Ok(response(event)));
                }
                self.progress = Instant::now();
            }
            // The client is gone: `watch` tells.
            Err(_) => std::future::pending().await,
        }
    }

    /// When the client is to be given up; `None` while nothing is pending.
    pub(crate) fn stall_deadline(&self) -> Option<Instant> {
        self.is_pending()
            .then(|| self.progress + self.stall_timeout)
    }

    /// A handle that tells when the client is gone.
    pub(crate) fn watch(&self) -> mpsc::Sender<Message> {
        self.sender.clone()
    }

    /// Ends the stream well.
    pub(crate) async fn finish(self, finished: Finished) {
        self.end(Ok(response(Event::Finished(finished)))).await;
    }

    /// Ends the stream with a fault, after what is pending.
    pub(crate) async fn fail(self, fault: Fault) {
        self.end(Err(fault.into())).await;
    }

    /// Ends the stream of a client that takes nothing.
    pub(crate) fn give_up(self) {
        tracing::warn!("the client reads too slowly: given up");
        self.last
            .send(Err(Fault::exhausted("the client reads too slowly").into()));
    }

    async fn end(mut self, end: Message) {
        // What is still provisional ends with the session.
        self.preview.clear();
        while let Some(event) = self.next() {
            let sent = self.sender.send(Ok(response(event)));
            match tokio::time::timeout(self.stall_timeout, sent).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return tracing::info!("the client left before the end"),
                Err(_) => return self.give_up(),
            }
        }
        self.last.send(end);
    }
}

fn response(event: Event) -> GenerateResponse {
    GenerateResponse { event: Some(event) }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;

    fn delta(start: u64) -> Delta {
        Delta {
            start,
            token_ids: vec![7],
            text: "x".to_owned(),
            logprobs: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_slow_client_gets_merged_deltas() {
        let (mut delivery, mut stream) = Delivery::new(Started::default(), Duration::from_secs(1));
        for start in 0..100 {
            delivery.add(delta(start));
            // As in a session: flushes when there is room, goes on when not.
            let _ = tokio::time::timeout(Duration::from_millis(1), delivery.flush()).await;
        }
        tokio::spawn(delivery.finish(Finished::default()));
        let (mut messages, mut next) = (0, 0);
        while let Some(message) = stream.next().await {
            messages += 1;
            if let Some(Event::Delta(delta)) = message.unwrap().event {
                assert_eq!(delta.start, next);
                assert_eq!(delta.text.len(), delta.token_ids.len());
                next += delta.token_ids.len() as u64;
            }
        }
        assert_eq!(next, 100);
        assert_eq!(messages, BUFFERED_MESSAGES + 2);
    }

    #[tokio::test]
    async fn a_stalled_client_has_a_deadline() {
        let (mut delivery, _stream) = Delivery::new(Started::default(), Duration::ZERO);
        assert!(delivery.stall_deadline().is_none());
        delivery.add(delta(0));
        assert!(delivery.stall_deadline().unwrap() <= Instant::now());
    }
}
