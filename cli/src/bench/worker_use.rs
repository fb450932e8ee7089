//! [`WorkerUse`]: how busy workers were during a load, from what the gateway's registry says of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use specattn_proto::v1;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_service::channel::Link;
use tokio::time::{Instant, MissedTickBehavior};

/// Time between two looks. Workers report to the gateway about once a second.
const INTERVAL: Duration = Duration::from_millis(250);

/// A worker over a window.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkerUse {
    /// The gateway's name for it.
    pub worker_id: String,
    /// `verify` or `draft`.
    pub role: &'static str,
    /// Mean sessions at the worker.
    pub sessions_mean: f64,
    /// Most sessions it takes.
    pub sessions_max: u32,
    /// Mean share of KV blocks in use.
    pub kv_mean: f64,
    /// Highest such share.
    pub kv_peak: f64,
    /// Tokens it processed, prompts included, by the window's length.
    pub tokens_per_second: f64,
}

/// What was seen of a worker.
#[derive(Debug)]
struct Seen {
    role: &'static str,
    looks: u32,
    sessions: f64,
    sessions_max: u32,
    kv: f64,
    kv_peak: f64,
    first: (Instant, u64),
    last: (Instant, u64),
}

/// Looks at the workers of the gateway behind `channel` from `from` until `to`. Looks that fail are left out: requests
/// then fail too, and are counted.
pub async fn watch(channel: Link, from: Instant, to: Instant) -> Vec<WorkerUse> {
    let mut client = RegistryServiceClient::new(channel);
    let mut seen = BTreeMap::new();
    let mut ticks = tokio::time::interval_at(from, INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let now = ticks.tick().await;
        if now >= to {
            break;
        }
        if let Ok(status) = client.status(v1::StatusRequest {}).await {
            for worker in status.into_inner().workers {
                note(&mut seen, worker, Instant::now());
            }
        }
    }
    seen.into_iter().map(|(id, seen)| seen.over(id)).collect()
}

fn note(seen: &mut BTreeMap<String, Seen>, worker: v1::WorkerStatus, now: Instant) {
    let role = match worker.role() {
        v1::WorkerRole::Verify => "verify",
        v1::WorkerRole::Draft => "draft",
        v1::WorkerRole::Unspecified => "unknown",
    };
    let load = worker.load.unwrap_or_default();
    let seen = seen.entry(worker.worker_id).or_insert(Seen {
        role,
        looks: 0,
        sessions: 0.0,
        sessions_max: 0,
        kv: 0.0,
        kv_peak: 0.0,
        first: (now, load.tokens_total),
        last: (now, load.tokens_total),
    });
    let kv = load.kv_blocks_used as f64 / load.kv_blocks_total.max(1) as f64;
    seen.looks += 1;
    seen.sessions += f64::from(load.sessions_active);
    seen.sessions_max = load.sessions_max;
    seen.kv += kv;
    seen.kv_peak = seen.kv_peak.max(kv);
    seen.last = (now, load.tokens_total);
}

impl Seen {
    fn over(self, worker_id: String) -> WorkerUse {
        let looks = f64::from(self.looks.max(1));
        let seconds = (self.last.0 - self.first.0).as_secs_f64();
        let tokens = self.last.1.saturating_sub(self.first.1) as f64;
        WorkerUse {
            worker_id,
            role: self.role,
            sessions_mean: self.sessions / looks,
            sessions_max: self.sessions_max,
            kv_mean: self.kv / looks,
            kv_peak: self.kv_peak,
            tokens_per_second: if seconds > 0.0 { tokens / seconds } else { 0.0 },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_averaged_and_tokens_are_a_rate() {
        let mut seen = BTreeMap::new();
        let start = Instant::now();
        for (second, sessions, blocks, tokens) in
            [(0, 2, 10, 1_000), (1, 4, 50, 1_400), (2, 6, 30, 2_000)]
        {
            let worker = v1::WorkerStatus {
                worker_id: "verify-1".to_owned(),
                role: v1::WorkerRole::Verify.into(),
                load: Some(v1::WorkerLoad {
                    sessions_active: sessions,
                    sessions_max: 8,
                    kv_blocks_used: blocks,
                    kv_blocks_total: 100,
                    tokens_total: tokens,
                    ..v1::WorkerLoad::default()
                }),
                ..v1::WorkerStatus::default()
            };
            note(&mut seen, worker, start + Duration::from_secs(second));
        }
        let workers: Vec<_> = seen.into_iter().map(|(id, seen)| seen.over(id)).collect();
        let [verify] = workers.as_slice() else {
            panic!("{workers:?}")
        };
        assert_eq!((verify.role, verify.sessions_max), ("verify", 8));
        assert_eq!(verify.sessions_mean, 4.0);
        assert!((verify.kv_mean - 0.3).abs() < 1e-9 && verify.kv_peak == 0.5);
        assert_eq!(verify.tokens_per_second, 500.0);
    }
}
