//! What a worker shows at `/metrics`: its load, as it stands when somebody looks.

use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use specattn_proto::v1::WorkerRole;

use crate::load::LoadGauge;

/// The metrics of a worker in `role`, under the role's name.
pub(crate) fn registry(role: WorkerRole, load: Arc<LoadGauge>) -> Registry {
    let prefix = match role {
        WorkerRole::Draft => "draft",
        WorkerRole::Verify | WorkerRole::Unspecified => "verify",
    };
    let mut registry = Registry::with_prefix(prefix);
    registry.register_collector(Box::new(LoadMetrics(load)));
    registry
}

/// Reads the gauge when asked, so that counting costs the engine thread nothing more.
#[derive(Debug)]
struct LoadMetrics(Arc<LoadGauge>);

impl Collector for LoadMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let load = self.0.report(false);
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
            ("kv_blocks_max", "KV blocks there are", load.kv_blocks_total),
            (
                "kv_blocks_cached",
                "KV blocks of prompts kept for sessions to come, free for others",
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
            (
                "busy_microseconds",
                "Time that forwards took",
                load.busy_us_total,
            ),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(
                name,
                help,
                None,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}
