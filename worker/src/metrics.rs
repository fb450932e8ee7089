//! What every worker shows at `/metrics`: its load, read when somebody looks, and how its forwards went.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use specattn_proto::v1::WorkerRole;

use crate::load::LoadGauge;

/// The metrics of a worker in `role`, under the role's name. A worker adds its own.
pub fn registry(role: WorkerRole, load: &Arc<LoadGauge>) -> Registry {
    let prefix = match role {
        WorkerRole::Draft => "draft",
        WorkerRole::Verify | WorkerRole::Unspecified => "verify",
    };
    let mut registry = Registry::with_prefix(prefix);
    load.forwards().register(&mut registry);
    registry.register_collector(Box::new(LoadMetrics(Arc::clone(load))));
    registry
}

/// A forward that was run.
#[derive(Debug, Clone, Copy)]
pub struct Forward {
    /// How long it took.
    pub time: Duration,
    /// Sessions in it.
    pub sessions: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Whether it processed a chunk of a prompt.
    pub is_prompt: bool,
}

/// Distributions over forwards.
#[derive(Debug)]
pub(crate) struct Forwards {
    /// Seconds.
    prompt: Histogram,
    decode: Histogram,
    /// Sessions and tokens of forwards that are no prompt's.
    batch_sessions: Histogram,
    batch_tokens: Histogram,
}

impl Default for Forwards {
    fn default() -> Self {
        // 0.1 ms to 1.6 s.
        let seconds = || Histogram::new(exponential_buckets(1e-4, 2.0, 15));
        Self {
            prompt: seconds(),
            decode: seconds(),
            batch_sessions: Histogram::new(exponential_buckets(1.0, 2.0, 9)),
            batch_tokens: Histogram::new(exponential_buckets(1.0, 2.0, 11)),
        }
    }
}

impl Forwards {
    pub(crate) fn observe(&self, forward: &Forward) {
        let seconds = forward.time.as_secs_f64();
        if forward.is_prompt {
            return self.prompt.observe(seconds);
        }
        self.decode.observe(seconds);
        // Far below 2^52.
        self.batch_sessions.observe(forward.sessions as f64);
        self.batch_tokens.observe(forward.tokens as f64);
    }

    fn register(&self, registry: &mut Registry) {
        for (name, help, histogram) in [
            (
                "forward_prompt_duration_seconds",
                "Time of forwards over a chunk of a prompt",
                &self.prompt,
            ),
            (
                "forward_duration_seconds",
                "Time of forwards of generating sessions",
                &self.decode,
            ),
            (
                "batch_sessions",
                "Sessions in a forward of generating sessions",
                &self.batch_sessions,
            ),
            (
                "batch_tokens",
                "Tokens in a forward of generating sessions",
                &self.batch_tokens,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
    }
}

/// Reads the gauge when asked, so that counting costs the engine thread nothing more.
#[derive(Debug)]
struct LoadMetrics(Arc<LoadGauge>);

impl Collector for LoadMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let load = self.0.report(false);
        let free = load.kv_blocks_total.saturating_sub(load.kv_blocks_used);
        let gauges = [
            (
                "sessions_active",
                "Sessions held",
                u64::from(load.sessions_active),
            ),
            (
                "sessions_max",
                "Most sessions held at a time",
                u64::from(load.sessions_max),
            ),
            ("kv_blocks_used", "KV blocks in use", load.kv_blocks_used),
            ("kv_blocks_free", "KV blocks that sessions may take", free),
            ("kv_blocks_max", "KV blocks there are", load.kv_blocks_total),
            (
                "kv_blocks_cached",
                "KV blocks of prompts kept for sessions to come, part of the free ones",
                load.kv_blocks_cached,
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value as f64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        let counters = [
            (
                "tokens",
                "Tokens that went through the model",
                load.tokens_total,
            ),
            (
                "prefix_tokens",
                "Prompt tokens that sessions found processed",
                load.prefix_tokens_total,
            ),
            (
                "kv_blocks_evicted",
                "Blocks of kept prompts given up for others",
                load.kv_blocks_evicted_total,
            ),
            (
                "preemptions",
                "Sessions whose KV blocks were taken for others",
                load.preemptions_total,
            ),
            (
                "forwards",
                "Forwards, of however many sessions",
                load.forwards_total,
            ),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            let kind = counter.metric_type();
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        let busy = ConstCounter::new(load.busy_us_total as f64 / 1e6);
        let kind = busy.metric_type();
        busy.encode(encoder.encode_descriptor(
            "busy_seconds",
            "Time that forwards took",
            None,
            kind,
        )?)
    }
}
