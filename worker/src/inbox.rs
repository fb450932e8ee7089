//! [`Inbox`]: how the gRPC edge reaches the engine thread: one bounded queue, one hop.
//!
//! The sending half is a Tokio channel, so that the edge waits for room without blocking a thread. The receiving half
//! belongs to the engine thread, which is no Tokio thread: it spins briefly, since the answer to a round often comes at
//! once, then parks until a message or a deadline wakes it.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

/// How long a waiting engine thread looks again before it parks.
const SPIN: Duration = Duration::from_micros(50);

/// What waiting came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<T> {
    /// A message.
    Message(T),
    /// The deadline passed.
    TimedOut,
    /// Every sender is gone.
    Closed,
}

/// The engine thread's end of the queue.
#[derive(Debug)]
pub struct Inbox<T> {
    receiver: mpsc::Receiver<T>,
    /// Unparks the thread that waited last.
    waker: Option<(std::thread::ThreadId, Waker)>,
}

/// A queue of at most `capacity` messages.
pub fn channel<T>(capacity: usize) -> (mpsc::Sender<T>, Inbox<T>) {
    let (sender, receiver) = mpsc::channel(capacity);
    (
        sender,
        Inbox {
            receiver,
            waker: None,
        },
    )
}

impl<T> Inbox<T> {
    /// The next message without waiting; [`Received::TimedOut`] when there is none yet.
    pub fn look(&mut self) -> Received<T> {
        match self.receiver.try_recv() {
            Ok(message) => Received::Message(message),
            Err(TryRecvError::Empty) => Received::TimedOut,
            Err(TryRecvError::Disconnected) => Received::Closed,
        }
    }

    /// Waits for a message until `deadline`, without one for as long as it takes.
    pub fn wait(&mut self, deadline: Option<Instant>) -> Received<T> {
        let start = Instant::now();
        loop {
            match self.look() {
                Received::TimedOut => {}
                received => return received,
            }
            if start.elapsed() >= SPIN {
                break;
            }
            std::thread::yield_now();
        }
        let waker = self.waker();
        let mut context = Context::from_waker(&waker);
        loop {
            match self.receiver.poll_recv(&mut context) {
                Poll::Ready(Some(message)) => return Received::Message(message),
                Poll::Ready(None) => return Received::Closed,
                Poll::Pending => {}
            }
            match deadline {
                None => std::thread::park(),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Received::TimedOut;
                    }
                    std::thread::park_timeout(left);
                }
            }
        }
    }

    /// A waker for the calling thread, kept while it stays the same.
    fn waker(&mut self) -> Waker {
        let current = std::thread::current();
        match &self.waker {
            Some((id, waker)) if *id == current.id() => waker.clone(),
            _ => {
                let id = current.id();
                let waker = Waker::from(Arc::new(Unpark(current)));
                self.waker = Some((id, waker.clone()));
                waker
            }
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_in_order_and_then_the_end() {
        let (sender, mut inbox) = channel(4);
        for i in 0..3 {
            sender.try_send(i).unwrap();
        }
        drop(sender);
        assert_eq!(inbox.look(), Received::Message(0));
        assert_eq!(inbox.wait(None), Received::Message(1));
        assert_eq!(inbox.wait(Some(Instant::now())), Received::Message(2));
        assert_eq!(inbox.look(), Received::Closed);
        assert_eq!(inbox.wait(None), Received::Closed);
    }

    #[test]
    fn a_parked_thread_is_woken() {
        let (sender, mut inbox) = channel(1);
        let engine = std::thread::spawn(move || {
            let mut sum = 0;
            while let Received::Message(i) = inbox.wait(None) {
                sum += i;
            }
            sum
        });
        for i in 1..=3 {
            std::thread::sleep(Duration::from_millis(5));
            sender.blocking_send(i).unwrap();
        }
        drop(sender);
        assert_eq!(engine.join().unwrap(), 6);
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let (sender, mut inbox) = channel::<()>(1);
        let start = Instant::now();
        let deadline = start + Duration::from_millis(20);
        assert_eq!(inbox.wait(Some(deadline)), Received::TimedOut);
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert_eq!(inbox.look(), Received::TimedOut);
        drop(sender);
    }
}
