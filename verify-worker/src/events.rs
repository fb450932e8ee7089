//! What a session tells its gateway: [`Outbox`], the engine's end, and [`Events`], the stream's.
//!
//! There is no queue between them but the committed tokens themselves: the engine appends, the stream takes all there
//! is. So the engine never waits for a slow reader, nothing is lost, and memory is bounded by the session's length.
//! Provisional tokens are a state, not a queue: a reader gets the latest, and hears of a withdrawal only when it had been
//! told of something that was withdrawn.
//!
//! A small model commits a token in less time than a message takes through three processes. So tokens committed less
//! than an interval after the last message wait for its end and travel together; the session's end waits for nothing.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use specattn_engine::sampling::TokenLogprobs;
use specattn_proto::Fault;
use specattn_proto::v1::FinishReason;
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;

use crate::origin::Origin;
use crate::stats::Stats;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A stop token was committed.
    Stop,
    /// The token limit or the context's end was reached.
    Length,
    /// The client gave up.
    Cancelled,
    /// The client's deadline passed.
    Deadline,
    /// The worker or its gateway failed.
    Error,
}

impl From<Ending> for FinishReason {
    fn from(ending: Ending) -> Self {
        match ending {
            Ending::Stop => Self::Stop,
            Ending::Length => Self::Length,
            Ending::Cancelled => Self::Cancelled,
            Ending::Deadline => Self::Deadline,
            Ending::Error => Self::Error,
        }
    }
}

/// One event of the stream.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// The session exists.
    Opened,
    /// Tokens from index `start` on are committed.
    Committed {
        start: usize,
        tokens: Vec<u32>,
        /// One per token.
        origins: Vec<Origin>,
        /// One per token when asked for, else empty.
        logprobs: Vec<TokenLogprobs>,
    },
    /// All tokens that are provisional now, from index `start`, the number of committed ones.
    Provisional { start: usize, tokens: Vec<u32> },
    /// Provisional tokens from this index on, of which the reader was told, are withdrawn.
    RolledBack { to: usize },
    /// The session is over.
    Finished { ending: Ending, stats: Stats },
    /// The stream's last word when the session failed.
    Failed(Fault),
}

#[derive(Debug, Default)]
struct State {
    opened: bool,
    /// Index of the first token not yet taken by the stream.
    start: usize,
    tokens: Vec<u32>,
    origins: Vec<Origin>,
    logprobs: Vec<TokenLogprobs>,
    /// What is provisional, when the stream has yet to take it.
    provisional: Option<Vec<u32>>,
    /// Tokens, provisional ones included, that the stream has told of and that still stand.
    told: usize,
    /// Where to a withdrawal went that the stream has yet to tell of.
    rolled_back: Option<usize>,
    /// What the session has cost so far.
    progress: Stats,
    /// How the session ended, until the stream has told.
    end: Option<(Ending, Stats)>,
    failure: Option<Fault>,
    /// No more will come.
    closed: bool,
    /// The stream is gone.
    abandoned: bool,
    /// The stream's task, while it waits for something to tell.
    waker: Option<Waker>,
    /// The stream waits for its interval to pass: it need not hear of more tokens.
    paced: bool,
}

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Shared) -> MutexGuard<'_, State> {
    // No code panics while holding the lock; if one did, the state would still be a valid one.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The two ends for a session that holds `start` tokens, whose messages of committed tokens are at least `interval`
/// apart. `on_abandoned` runs when the stream is dropped.
pub(crate) fn channel(
    start: usize,
    interval: Duration,
    on_abandoned: impl FnOnce() + Send + 'static,
) -> (Outbox, Events) {
    let shared = Arc::new(Mutex::new(State {
        start,
        ..State::default()
    }));
    let events = Events {
        shared: Arc::clone(&shared),
        interval,
        pause: None,
        on_abandoned: Some(Box::new(on_abandoned)),
    };
    (Outbox { shared }, events)
}

/// The engine's end. Dropped without an end, it reports a failure.
#[derive(Debug)]
pub(crate) struct Outbox {
    shared: Shared,
}

impl Outbox {
    /// Tells of committed tokens, of how each came about, and of their log-probabilities where the session reports them.
    pub(crate) fn commit(
        &self,
        tokens: &[u32],
        origins: Vec<Origin>,
        logprobs: Vec<TokenLogprobs>,
    ) {
        self.change(|state| {
            state.tokens.extend_from_slice(tokens);
            state.origins.extend(origins);
            state.logprobs.extend(logprobs);
            // What was provisional is committed now, or withdrawn.
            state.provisional = None;
        });
    }

    /// Notes what the session has cost so far; it travels with the next message of committed tokens.
    pub(crate) fn progress(&self, stats: Stats) {
        lock(&self.shared).progress = stats;
    }

    /// Tells of all tokens that are provisional now.
    pub(crate) fn provisional(&self, tokens: &[u32]) {
        self.change(|state| state.provisional = Some(tokens.to_vec()));
    }

    /// Tells that provisional tokens from index `to` on are withdrawn.
    pub(crate) fn withdraw(&self, to: usize) {
        self.change(|state| {
            state.provisional = None;
            if to < state.told {
                state.told = to;
                state.rolled_back = Some(to);
            }
        });
    }

    /// Tells how the session ended.
    pub(crate) fn finish(self, ending: Ending, stats: Stats, failure: Option<Fault>) {
        self.change(|state| {
            state.end = Some((ending, stats));
            state.failure = failure;
            state.closed = true;
        });
    }

    /// Whether nobody listens any more.
    pub(crate) fn is_abandoned(&self) -> bool {
        lock(&self.shared).abandoned
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = lock(&self.shared);
            change(&mut state);
            if state.paced && !state.closed {
                return;
            }
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        if !lock(&self.shared).closed {
            self.change(|state| {
                state.failure = Some(Fault::Internal("the session was dropped".to_owned()));
                state.closed = true;
            });
        }
    }
}

/// The stream's end. Dropping it abandons the session.
pub(crate) struct Events {
    shared: Shared,
    interval: Duration,
    /// Runs from a message of committed tokens to the earliest time of the next.
    pause: Option<Pin<Box<Sleep>>>,
    on_abandoned: Option<Box<dyn FnOnce() + Send>>,
}

impl Events {
    /// What the session has cost so far.
    pub(crate) fn progress(&self) -> Stats {
        lock(&self.shared).progress
    }
}

impl State {
    fn next(&mut self) -> Option<Event> {
        if !self.opened {
            self.opened = true;
            return Some(Event::Opened);
        }
        if let Some(to) = self.rolled_back.take() {
            return Some(Event::RolledBack { to });
        }
        if !self.tokens.is_empty() {
            let tokens = std::mem::take(&mut self.tokens);
            let start = self.start;
            self.start += tokens.len();
            self.told = self.told.max(self.start);
            return Some(Event::Committed {
                start,
                tokens,
                origins: std::mem::take(&mut self.origins),
                logprobs: std::mem::take(&mut self.logprobs),
            });
        }
        if let Some(tokens) = self.provisional.take() {
            let start = self.start;
            self.told = self.told.max(start + tokens.len());
            return Some(Event::Provisional { start, tokens });
        }
        if let Some((ending, stats)) = self.end.take() {
            return Some(Event::Finished { ending, stats });
        }
        self.failure.take().map(Event::Failed)
    }
}

impl Stream for Events {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let events = self.get_mut();
        let mut state = lock(&events.shared);
        if let Some(pause) = &mut events.pause
            && !state.closed
        {
            state.paced = true;
            state.waker = Some(context.waker().clone());
            // The lock is held: an end that comes now finds the waker.
            ready!(pause.as_mut().poll(context));
        }
        events.pause = None;
        state.paced = false;
        match state.next() {
            Some(event) => {
                let paced = matches!(event, Event::Committed { .. } | Event::Provisional { .. });
                if paced && !events.interval.is_zero() {
                    events.pause = Some(Box::pin(sleep(events.interval)));
                }
                Poll::Ready(Some(event))
            }
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        lock(&self.shared).abandoned = true;
        if let Some(on_abandoned) = self.on_abandoned.take() {
            on_abandoned();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test]
    async fn commits_are_joined_and_indexed() {
        let (outbox, mut events) = channel(3, Duration::ZERO, || {});
        assert_eq!(events.next().await, Some(Event::Opened));
        outbox.commit(&[7], Vec::new(), Vec::new());
        outbox.commit(&[8, 9], Vec::new(), Vec::new());
        let committed = |start, tokens: &[u32]| Event::Committed {
            start,
            tokens: tokens.to_vec(),
            origins: Vec::new(),
            logprobs: Vec::new(),
        };
        assert_eq!(events.next().await, Some(committed(3, &[7, 8, 9])));
        outbox.commit(&[1], Vec::new(), Vec::new());
        outbox.finish(Ending::Stop, Stats::default(), None);
        assert_eq!(events.next().await, Some(committed(6, &[1])));
        let end = Event::Finished {
            ending: Ending::Stop,
            stats: Stats::default(),
        };
        assert_eq!(events.next().await, Some(end));
        assert_eq!(events.next().await, None);
    }

    #[tokio::test]
    async fn provisional_tokens_are_told_as_they_stand() {
        let (outbox, mut events) = channel(3, Duration::ZERO, || {});
        events.next().await;
        let provisional = |start, tokens: &[u32]| {
            let tokens = tokens.to_vec();
            Some(Event::Provisional { start, tokens })
        };
        outbox.provisional(&[7]);
        outbox.provisional(&[7, 8]);
        assert_eq!(events.next().await, provisional(3, &[7, 8]));
        // The second is withdrawn and replaced.
        outbox.withdraw(4);
        outbox.commit(&[7, 9], Vec::new(), Vec::new());
        outbox.provisional(&[1]);
        assert_eq!(events.next().await, Some(Event::RolledBack { to: 4 }));
        let committed = Event::Committed {
            start: 3,
            tokens: vec![7, 9],
            origins: Vec::new(),
            logprobs: Vec::new(),
        };
        assert_eq!(events.next().await, Some(committed));
        assert_eq!(events.next().await, provisional(5, &[1]));
        // What the reader never heard of is withdrawn in silence, and what became committed is not told again.
        outbox.provisional(&[1, 2]);
        outbox.withdraw(6);
        outbox.commit(&[1, 3], Vec::new(), Vec::new());
        assert!(
            matches!(events.next().await, Some(Event::Committed { tokens, .. }) if tokens == [1, 3])
        );
        outbox.finish(Ending::Stop, Stats::default(), None);
        assert!(matches!(events.next().await, Some(Event::Finished { .. })));
    }

    #[tokio::test]
    async fn a_waiting_stream_is_woken() {
        let (outbox, mut events) = channel(0, Duration::ZERO, || {});
        events.next().await;
        let writer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(5));
            outbox.commit(&[1], Vec::new(), Vec::new());
            outbox
        });
        assert!(matches!(events.next().await, Some(Event::Committed { .. })));
        drop(writer.join().unwrap());
        assert!(matches!(events.next().await, Some(Event::Failed(_))));
        assert_eq!(events.next().await, None);
    }

    #[tokio::test]
    async fn tokens_within_the_interval_travel_together_and_the_end_at_once() {
        let interval = Duration::from_millis(500);
        let (outbox, mut events) = channel(0, interval, || {});
        events.next().await;
        outbox.commit(&[1], Vec::new(), Vec::new());
        let begin = Instant::now();
        let first = events.next().await;
        assert!(matches!(first, Some(Event::Committed { start: 0, .. })));
        outbox.commit(&[2], Vec::new(), Vec::new());
        outbox.commit(&[3], Vec::new(), Vec::new());
        let Some(Event::Committed { tokens, .. }) = events.next().await else {
            panic!("tokens were committed");
        };
        assert_eq!(tokens, [2, 3]);
        assert!(begin.elapsed() >= interval);
        // An end that comes while the stream waits wakes it at once.
        let (waiting, was) = (
            tokio::spawn(async move { events.next().await }),
            Instant::now(),
        );
        tokio::task::yield_now().await;
        outbox.commit(&[4], Vec::new(), Vec::new());
        outbox.finish(Ending::Stop, Stats::default(), None);
        let last = waiting.await.unwrap();
        assert!(matches!(last, Some(Event::Committed { start: 3, .. })));
        assert!(was.elapsed() < interval);
    }

    #[test]
    fn dropping_the_stream_is_noticed() {
        let told = Arc::new(Mutex::new(false));
        let seen = Arc::clone(&told);
        let (outbox, events) = channel(0, Duration::ZERO, move || *seen.lock().unwrap() = true);
        assert!(!outbox.is_abandoned());
        drop(events);
        assert!(outbox.is_abandoned() && *told.lock().unwrap());
    }
}
