//! [`LoadTest`]: a load held for a while, and everything that came of it.
//!
//! Requests run as tasks of one runtime; what they share with the progress line are counters. An open loop counts waits
//! from the moment a request was due (to a timer's millisecond), so that a server that stalls is charged for the
//! requests that piled up meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use indicatif::ProgressBar;
use specattn_service::channel::Link;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::bench::arrivals::{Load, Poisson};
use crate::bench::prompts::Workload;
use crate::bench::request_timing::{self, Clock, Timed};
use crate::bench::tally::{Figures, LatencyTarget, Tally};
use crate::bench::worker_use::{self, WorkerUse};

/// Time between two changes of the progress line.
const REDRAW: Duration = Duration::from_millis(250);

/// What a client of a closed loop waits after a failure, so that a server which refuses is not asked in a tight loop.
const FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// How loads are measured.
#[derive(Debug)]
pub struct LoadTest {
    /// Connections to the gateway; at least one.
    pub channels: Vec<Link>,
    /// What is asked.
    pub workload: Arc<Workload>,
    /// Load before the window.
    pub warmup: Duration,
    /// The window's length.
    pub duration: Duration,
    /// What requests get to finish after it.
    pub patience: Duration,
    /// Most requests at a time in an open loop.
    pub max_in_flight: usize,
    /// What a good request keeps within.
    pub target: LatencyTarget,
}

/// One load and its figures.
#[derive(Debug)]
pub struct Measured {
    /// What was offered.
    pub load: Load,
    /// What the clients saw.
    pub figures: Figures,
    /// What the registry said of the workers.
    pub workers: Vec<WorkerUse>,
}

/// Counters of a running load.
#[derive(Debug, Default)]
struct Live {
    in_flight: AtomicU64,
    done: AtomicU64,
    failed: AtomicU64,
    tokens: AtomicU64,
}

/// A load that runs.
struct Running<'a> {
    test: &'a LoadTest,
    start: Instant,
    requests: JoinSet<Timed>,
    tally: Tally,
    live: Arc<Live>,
    /// Numbers the requests.
    next: u64,
}

impl LoadTest {
    /// Holds `load` and measures; `bar` shows how it goes.
    pub async fn run(&self, load: Load, bar: &ProgressBar) -> Measured {
        let window = self.warmup..self.warmup + self.duration;
        let start = Instant::now();
        let watching = tokio::spawn(worker_use::watch(
            self.channels[0].clone(),
            start + window.start,
            start + window.end,
        ));
        let mut running = Running {
            test: self,
            start,
            requests: JoinSet::new(),
            tally: Tally::new(window.clone(), self.target),
            live: Arc::default(),
            next: 0,
        };
        let live = Arc::clone(&running.live);
        let offering = async {
            match load {
                Load::Rate(rate) => running.open_loop(rate, window.end).await,
                Load::Concurrency(clients) => running.closed_loop(clients, window.end).await,
            }
            running.finish().await;
        };
        let progress = show(bar, load, window.end, start, &live);
        tokio::select! {
            () = offering => {}
            () = progress => unreachable!("the progress line has no end"),
        }
        Measured {
            load,
            figures: running.tally.figures(),
            workers: watching.await.unwrap_or_default(),
        }
    }
}

impl Running<'_> {
    async fn open_loop(&mut self, rate: f64, until: Duration) {
        let arrivals = Poisson::new(rate, self.test.workload.seed);
        for due in arrivals.take_while(|&due| due < until) {
            self.take_until(self.start + due).await;
            if self.requests.len() < self.test.max_in_flight {
                self.send(due);
            } else {
                let full = Timed::failed(due, self.start.elapsed(), "max_in_flight");
                self.live.failed.fetch_add(1, Ordering::Relaxed);
                self.tally.take(&full);
            }
        }
        self.take_until(self.start + until).await;
    }

    async fn closed_loop(&mut self, clients: u32, until: Duration) {
        for _ in 0..clients {
            self.send(self.start.elapsed());
        }
        let end = sleep_until(self.start + until);
        tokio::pin!(end);
        loop {
            tokio::select! {
                Some(timed) = self.requests.join_next() => {
                    let timed = timed.expect("requests do not panic");
                    self.tally.take(&timed);
                    let pause = match timed.outcome {
                        Ok(_) => Duration::ZERO,
                        Err(_) => FAILURE_PAUSE,
                    };
                    self.send(self.start.elapsed() + pause);
                }
                () = &mut end => return,
            }
        }
    }

    /// Takes in what ends until `deadline`.
    async fn take_until(&mut self, deadline: Instant) {
        let end = sleep_until(deadline);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return,
                Some(timed) = self.requests.join_next() => {
                    self.tally.take(&timed.expect("requests do not panic"));
                }
            }
        }
    }

    /// Takes in what still runs; requests end by themselves once patience is over.
    async fn finish(&mut self) {
        while let Some(timed) = self.requests.join_next().await {
            self.tally.take(&timed.expect("requests do not panic"));
        }
    }

    /// Starts the next request, which is due at `due`.
    fn send(&mut self, due: Duration) {
        let index = self.next;
        self.next += 1;
        let channels = &self.test.channels;
        let channel = channels[index as usize % channels.len()].clone();
        let workload = Arc::clone(&self.test.workload);
        let live = Arc::clone(&self.live);
        let clock = Clock {
            start: self.start,
            due,
            give_up: self.start + self.test.warmup + self.test.duration + self.test.patience,
        };
        self.requests.spawn(async move {
            sleep_until(clock.start + due).await;
            live.in_flight.fetch_add(1, Ordering::Relaxed);
            let request = workload.request(index);
            let timed = request_timing::time(channel, request, clock, |count| {
                live.tokens.fetch_add(count.into(), Ordering::Relaxed);
            })
            .await;
            live.in_flight.fetch_sub(1, Ordering::Relaxed);
            let ended = match timed.outcome {
                Ok(_) => &live.done,
                Err(_) => &live.failed,
            };
            ended.fetch_add(1, Ordering::Relaxed);
            timed
        });
    }
}

/// Keeps the progress line true; without end.
async fn show(bar: &ProgressBar, load: Load, end: Duration, start: Instant, live: &Live) {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut ticks = tokio::time::interval(REDRAW);
    let (mut before, mut tokens) = (start, 0);
    loop {
        let now = ticks.tick().await;
        let (new, seconds) = (count(&live.tokens), (now - before).as_secs_f64());
        let rate = if seconds > 0.0 {
            (new - tokens) as f64 / seconds
        } else {
            0.0
        };
        (before, tokens) = (now, new);
        bar.set_message(format!(
            "{load}: {:.0} of {:.0} s, {} running, {} done, {} failed, {rate:.0} tokens/s",
            start.elapsed().as_secs_f64(),
            end.as_secs_f64(),
            count(&live.in_flight),
            count(&live.done),
            count(&live.failed),
        ));
        bar.tick();
    }
}
