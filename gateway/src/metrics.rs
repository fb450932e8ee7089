//! [`Metrics`]: what the gateway counts, and [`registry`]: what it shows at `/metrics`.
//!
//! Requests, tokens and times are counted as they happen. Queue, sessions, workers and log are read when somebody looks.
//! A request's outcome is the reason for which its session finished, or the label of the fault that ended it.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use specattn_proto::v1::FinishReason;

use crate::Gateway;
use crate::log::SessionLog;

/// Outcome of a session whose client left it.
pub(crate) const ABANDONED: &str = "abandoned";

type Label = [(&'static str, &'static str); 1];

/// Counters that move with requests.
#[derive(Debug)]
pub(crate) struct Metrics {
    requests: Family<Label, Counter>,
    prompt_tokens: Counter,
    completion_tokens: Counter,
    queue_wait: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    duration: Histogram,
    reopened: Counter,
    resumed: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            prompt_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            // 1 ms to 33 s.
            queue_wait: Histogram::new(exponential_buckets(1e-3, 2.0, 16)),
            // 4 ms to 65 s.
            first_token: Histogram::new(exponential_buckets(4e-3, 2.0, 15)),
            // 0.1 ms to 1.6 s.
            inter_token: Histogram::new(exponential_buckets(1e-4, 2.0, 15)),
            // 16 ms to 262 s.
            duration: Histogram::new(exponential_buckets(16e-3, 2.0, 15)),
            reopened: Counter::default(),
            resumed: Counter::default(),
        }
    }
}

impl Metrics {
    /// A request waited so long for its place, and got it.
    pub(crate) fn admitted(&self, waited: Duration) {
        self.queue_wait.observe(waited.as_secs_f64());
    }

    /// A session with so many tokens of prompt was opened for the first time.
    pub(crate) fn opened(&self, prompt_tokens: usize) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
    }

    /// Tokens were committed.
    pub(crate) fn tokens(&self, tokens: usize) {
        self.completion_tokens.inc_by(tokens as u64);
    }

    /// The first tokens came so long after the request.
    pub(crate) fn first_tokens(&self, tokens: usize, after: Duration) {
        self.tokens(tokens);
        self.first_token.observe(after.as_secs_f64());
    }

    /// Later tokens came together, so long after those before.
    pub(crate) fn later_tokens(&self, tokens: usize, after: Duration) {
        self.tokens(tokens);
        let each = after.as_secs_f64() / tokens as f64;
        (0..tokens).for_each(|_| self.inter_token.observe(each));
    }

    /// A session was opened again, after its verify worker was lost.
    pub(crate) fn reopened(&self) {
        self.reopened.inc();
    }

    /// A session was taken up from the log.
    pub(crate) fn resumed(&self) {
        self.resumed.inc();
    }

    /// A session finished, so long after its request arrived.
    pub(crate) fn finished(&self, reason: FinishReason, elapsed: Duration) {
        self.duration.observe(elapsed.as_secs_f64());
        self.ended(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Deadline => "deadline",
            FinishReason::Error | FinishReason::Unspecified => "error",
        });
    }

    /// A request ended.
    pub(crate) fn ended(&self, outcome: &'static str) {
        self.requests.get_or_create(&[("outcome", outcome)]).inc();
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "requests",
            "Requests that ended, by outcome",
            self.requests.clone(),
        );
        for (name, help, counter) in [
            (
                "tokens_prompt",
                "Tokens of the prompts of sessions opened",
                &self.prompt_tokens,
            ),
            (
                "tokens_completion",
                "Tokens committed",
                &self.completion_tokens,
            ),
            (
                "sessions_reopened",
                "Times that a session was opened again after its verify worker was lost",
                &self.reopened,
            ),
            (
                "sessions_resumed",
                "Sessions taken up from the log",
                &self.resumed,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        for (name, help, histogram) in [
            (
                "queue_wait_seconds",
                "Time that admitted requests waited for a place",
                &self.queue_wait,
            ),
            (
                "first_token_seconds",
                "Time from a request's arrival to its first token",
                &self.first_token,
            ),
            (
                "inter_token_seconds",
                "Time per token after the first message of tokens",
                &self.inter_token,
            ),
            (
                "request_duration_seconds",
                "Time from a request's arrival to the end of its session",
                &self.duration,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
    }
}

/// All that `gateway` shows.
pub(crate) fn registry(gateway: &Arc<Gateway>) -> Registry {
    let mut registry = Registry::with_prefix("gateway");
    gateway.metrics.register(&mut registry);
    if let Some(log) = &gateway.log {
        for (name, help, histogram) in [
            (
                "log_write_duration_seconds",
                "Time that appending to the session log took",
                &log.times().write,
            ),
            (
                "log_flush_duration_seconds",
                "Time that flushing the session log to its device took",
                &log.times().flush,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
    }
    registry.register_collector(Box::new(Present(Arc::clone(gateway))));
    registry
}

/// How things stand now.
struct Present(Arc<Gateway>);

impl std::fmt::Debug for Present {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Present").finish_non_exhaustive()
    }
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Self(gateway) = self;
        let (log_bytes, log_sessions) = gateway.log.as_ref().map_or((0, 0), SessionLog::usage);
        for (name, help, value) in [
            (
                "requests_queued",
                "Requests that wait for a place",
                gateway.admission.queued() as u64,
            ),
            (
                "sessions_active",
                "Sessions that run",
                gateway.sessions.len() as u64,
            ),
            ("log_bytes", "Size of the session log", log_bytes),
            (
                "log_sessions",
                "Sessions in the log, ended ones included",
                log_sessions,
            ),
        ] {
            let gauge = ConstGauge::new(value as f64);
            gauge.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        let mut workers = encoder.encode_descriptor(
            "workers",
            "Workers, by role and whether they take sessions",
            None,
            MetricType::Gauge,
        )?;
        for ((role, state), count) in gateway.registry.census() {
            let labels = [("role", role), ("state", state)];
            ConstGauge::new(f64::from(count)).encode(workers.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// The fastest pair measured so far commits a token in 500 µs: a hundredth of that is 5 µs.
    #[test]
    fn counting_a_token_costs_far_less_than_a_hundredth_of_making_it() {
        let metrics = Metrics::default();
        let batch = || {
            let start = Instant::now();
            for _ in 0..250 {
                metrics.later_tokens(4, Duration::from_millis(2));
            }
            start.elapsed() / 1_000
        };
        // The fastest of many: others use the machine too.
        let each = (0..100).map(|_| batch()).min().unwrap_or_default();
        eprintln!("{} ns a token", each.as_nanos());
        assert!(each < Duration::from_micros(1), "{each:?} a token");
    }
}
