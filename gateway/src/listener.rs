//! [`Listener`]: the way to one client, from a token index to the end, and [`Audience`]: whether a session has one.
//!
//! Messages in flight are bounded, and the next message is made only when there is room for it, of all there is by then.
//! A client that takes nothing for too long is given up; its session then has no audience. A client that comes back takes
//! the place of its earlier stream, which may not know yet that its connection is broken.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{GenerateResponse, Started};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::transcript::{End, Next, Reader};

/// Messages that may wait for the client's connection.
const BUFFERED_MESSAGES: usize = 16;

type Message = Result<GenerateResponse, Status>;

/// The client's stream, as the server reads it.
pub(crate) type ClientStream = tokio_stream::wrappers::ReceiverStream<Message>;

/// A client's stream and its place in the transcript.
pub(crate) struct Listener {
    reader: Reader,
    sender: mpsc::Sender<Message>,
    /// A place kept for the stream's last message, so that even a client that reads late learns how it ended.
    last: mpsc::OwnedPermit<Message>,
    stall_timeout: Duration,
}

impl Listener {
    /// A stream that begins with `started`.
    pub(crate) fn new(
        reader: Reader,
        started: Started,
        stall_timeout: Duration,
    ) -> (Self, ClientStream) {
        let (sender, receiver) = mpsc::channel(BUFFERED_MESSAGES + 1);
        let last = sender
            .clone()
            .try_reserve_owned()
            .expect("a fresh channel has room");
        sender
            .try_send(Ok(response(Event::Started(started))))
            .expect("a fresh channel has room");
        let listener = Self {
            reader,
            sender,
            last,
            stall_timeout,
        };
        (listener, ClientStream::new(receiver))
    }

    /// Tells the client all there is until the end, until it leaves, or until another takes its `seat`.
    pub(crate) async fn run(mut self, seat: Option<Seat>) {
        let replaced = seat.as_ref().map(|seat| seat.replaced.clone());
        let replaced = async {
            match replaced {
                Some(replaced) => replaced.cancelled().await,
                None => std::future::pending().await,
            }
        };
        let end = tokio::select! {
            end = self.tell() => end,
            () = replaced => Some(Err(Fault::FailedPrecondition(
                "the session was resumed by another stream".to_owned(),
            ))),
        };
        if let Some(end) = end {
            self.last.send(match end {
                Ok(finished) => Ok(response(Event::Finished(finished))),
                Err(fault) => Err(fault.into()),
            });
        }
    }

    /// Tells all there is; gives the last message, unless the client has left.
    async fn tell(&mut self) -> Option<End> {
        loop {
            if !self.reader.is_ready() {
                tokio::select! {
                    () = self.reader.changed() => continue,
                    () = self.sender.closed() => return None,
                }
            }
            let room = tokio::time::timeout(self.stall_timeout, self.sender.reserve());
            let permit = match room.await {
                Ok(Ok(permit)) => permit,
                Ok(Err(_)) => return None,
                Err(_) => {
                    tracing::warn!("the client reads too slowly: given up");
                    return Some(Err(Fault::exhausted("the client reads too slowly")));
                }
            };
            match self.reader.next() {
                Next::Event(event) => permit.send(Ok(response(event))),
                Next::End(end) => return Some(end),
                Next::Nothing => {}
            }
        }
    }
}

fn response(event: Event) -> GenerateResponse {
    GenerateResponse { event: Some(event) }
}

/// Who listens to a session: one stream at most, the latest.
#[derive(Default)]
pub(crate) struct Audience {
    /// Ends the stream that listens now.
    current: Mutex<Option<CancellationToken>>,
    present: watch::Sender<bool>,
}

/// A stream's place in the audience.
pub(crate) struct Seat {
    audience: Arc<Audience>,
    replaced: CancellationToken,
}

impl Audience {
    fn current(&self) -> MutexGuard<'_, Option<CancellationToken>> {
        // No code panics while it holds the lock halfway through a change.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the place of whoever listens.
    pub(crate) fn join(self: &Arc<Self>) -> Seat {
        let replaced = CancellationToken::new();
        let mut current = self.current();
        if let Some(before) = current.replace(replaced.clone()) {
            before.cancel();
        }
        self.present.send_replace(true);
        drop(current);
        Seat {
            audience: Arc::clone(self),
            replaced,
        }
    }

    /// Whether somebody listens.
    pub(crate) fn is_present(&self) -> bool {
        *self.present.borrow()
    }

    /// Completes once nobody has listened for `linger`.
    pub(crate) async fn absent(&self, linger: Duration) {
        let mut present = self.present.subscribe();
        loop {
            // The sender is `self`: no wait can fail.
            let _ = present.wait_for(|present| !present).await;
            let back = present.wait_for(|present| *present);
            if tokio::time::timeout(linger, back).await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut current = self.audience.current();
        if !self.replaced.is_cancelled() {
            *current = None;
            self.audience.present.send_replace(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use specattn_proto::v1::Finished;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::transcript::{Commit, Transcript};

    fn listener(transcript: &Arc<Transcript>, stall: Duration) -> (Listener, ClientStream) {
        let reader = Reader::new(Arc::clone(transcript), 0).unwrap();
        Listener::new(reader, Started::default(), stall)
    }

    fn one() -> Commit {
        Commit {
            tokens: vec![7],
            texts: vec!["x".to_owned()],
            origins: Vec::new(),
            logprobs: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_slow_client_gets_merged_deltas() {
        let transcript = Arc::new(Transcript::new(vec![1]));
        let (listener, mut stream) = listener(&transcript, Duration::from_secs(5));
        let running = tokio::spawn(listener.run(None));
        for _ in 0..100 {
            transcript.commit(one());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        transcript.end("", Ok(Finished::default()));
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
        running.await.unwrap();
    }

    #[tokio::test]
    async fn a_stalled_client_is_given_up() {
        let transcript = Arc::new(Transcript::new(vec![1]));
        let (listener, stream) = listener(&transcript, Duration::from_millis(20));
        let audience = Arc::new(Audience::default());
        let running = tokio::spawn(listener.run(Some(audience.join())));
        for _ in 0..100 {
            transcript.commit(one());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        running.await.unwrap();
        assert!(!audience.is_present());
        let messages: Vec<_> = stream.collect().await;
        assert!(messages.last().unwrap().is_err());
    }

    #[tokio::test]
    async fn the_latest_stream_listens_and_absence_is_noticed() {
        let transcript = Arc::new(Transcript::new(vec![1]));
        let audience = Arc::new(Audience::default());
        let (first, mut first_stream) = listener(&transcript, Duration::from_secs(5));
        let first = tokio::spawn(first.run(Some(audience.join())));
        let (second, second_stream) = listener(&transcript, Duration::from_secs(5));
        let second = tokio::spawn(second.run(Some(audience.join())));
        first.await.unwrap();
        assert!(first_stream.next().await.unwrap().is_ok());
        assert!(first_stream.next().await.unwrap().is_err());
        assert!(audience.is_present());
        drop(second_stream);
        second.await.unwrap();
        audience.absent(Duration::from_millis(5)).await;
        assert!(!audience.is_present());
    }
}
