//! [`Registry`]: the workers that exist now, how loaded they are, and which to take.
//!
//! Workers come from registration streams and from lists of endpoints alike; whoever brings one in also removes it. An
//! endpoint is in the registry once per role: a worker that comes back before its old entry is gone replaces it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use specattn_proto::v1::{ModelInfo, WorkerLoad, WorkerRole, WorkerStatus};
use specattn_proto::{Fault, validate};
use specattn_service::channel;
use tokio::sync::watch;
use tonic::transport::Channel;

/// Most workers of one gateway.
const MAX_WORKERS: usize = 1_024;

/// Names a stay of a worker in the registry; one that leaves and returns gets another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WorkerId {
    role: WorkerRole,
    number: u64,
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self.role {
            WorkerRole::Verify => "verify",
            WorkerRole::Draft => "draft",
            WorkerRole::Unspecified => "worker",
        };
        write!(f, "{role}-{}", self.number)
    }
}

/// A worker as sessions use it.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) endpoint: String,
    pub(crate) model: Arc<ModelInfo>,
    /// Connects when first used, and again after a loss.
    pub(crate) channel: Channel,
}

struct Record {
    worker: Worker,
    load: WorkerLoad,
    heard: Instant,
    /// Sessions of this gateway.
    assigned: u32,
}

impl Record {
    /// How full the worker is: what it said last or what was assigned since, whichever is more. Below 1 there is room.
    fn fullness(&self) -> f64 {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let sessions = self.load.sessions_active.max(self.assigned);
        let slots = share(sessions.into(), self.load.sessions_max.into());
        // Block counts are far below 2^52: the conversion is exact.
        let blocks = share(
            self.load.kv_blocks_used as f64,
            self.load.kv_blocks_total as f64,
        );
        slots.max(blocks)
    }
}

#[derive(Default)]
struct Records {
    by_id: BTreeMap<WorkerId, Record>,
    last_number: u64,
}

/// The workers of a gateway.
pub(crate) struct Registry {
    /// SHA-256 of the gateway's tokenizer.json: verify workers must run a model that goes with it.
    tokenizer_hash: String,
    records: Mutex<Records>,
    /// Counts the changes that may bring a new choice.
    changes: watch::Sender<u64>,
}

impl Registry {
    pub(crate) fn new(tokenizer_hash: String) -> Self {
        Self {
            tokenizer_hash,
            records: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        // No code panics while it holds the lock halfway through a change.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes when workers come, go, or gain room.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Takes a worker in. Needs a running Tokio runtime.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] for values out of range, [`Fault::FailedPrecondition`] for a verify worker whose model
    /// does not go with the gateway's tokenizer, [`Fault::ResourceExhausted`] when there are too many workers.
    pub(crate) fn add(
        &self,
        role: WorkerRole,
        endpoint: String,
        model: Option<ModelInfo>,
        load: WorkerLoad,
    ) -> Result<WorkerId, Fault> {
        if role == WorkerRole::Unspecified {
            return Err(Fault::InvalidArgument("role must be given".to_owned()));
        }
        let model = Arc::new(validate::model_info(model)?);
        let channel = channel::connect_lazy(&endpoint)?;
        if role == WorkerRole::Verify && differs(&self.tokenizer_hash, &model.tokenizer_hash) {
            let text = format!(
                "verify worker {endpoint} runs {} with another tokenizer than the gateway's",
                model.name
            );
            tracing::warn!(
                gateway_tokenizer = self.tokenizer_hash,
                worker_tokenizer = model.tokenizer_hash,
                "{text}"
            );
            return Err(Fault::FailedPrecondition(text));
        }
        let mut records = self.records();
        records.by_id.retain(|id, record| {
            let replaced = id.role == role && record.worker.endpoint == endpoint;
            if replaced {
                tracing::info!(worker_id = %id, endpoint, "worker came back: its old entry goes");
            }
            !replaced
        });
        if records.by_id.len() >= MAX_WORKERS {
            return Err(Fault::exhausted(format!(
                "the gateway holds {MAX_WORKERS} workers already"
            )));
        }
        records.last_number += 1;
        let id = WorkerId {
            role,
            number: records.last_number,
        };
        tracing::info!(worker_id = %id, endpoint, model = model.name, "worker joined");
        for (other, record) in &records.by_id {
            warn_of_misfit(id, &model, *other, &record.worker.model);
        }
        let record = Record {
            worker: Worker {
                id,
                endpoint,
                model,
                channel,
            },
            load,
            heard: Instant::now(),
            assigned: 0,
        };
        records.by_id.insert(id, record);
        drop(records);
        self.changed();
        Ok(id)
    }

    /// Notes a heartbeat; false when the worker is not here any more.
    pub(crate) fn report(&self, id: WorkerId, load: WorkerLoad) -> bool {
        let mut records = self.records();
        let Some(record) = records.by_id.get_mut(&id) else {
            return false;
        };
        let before = record.fullness();
        let drains = load.draining && !record.load.draining;
        record.load = load;
        record.heard = Instant::now();
        let gained_room = record.fullness() < before;
        drop(records);
        if drains {
            tracing::info!(worker_id = %id, "worker drains");
        }
        if gained_room {
            self.changed();
        }
        true
    }

    /// Takes a worker out.
    pub(crate) fn remove(&self, id: WorkerId, reason: &str) {
        if self.records().by_id.remove(&id).is_some() {
            tracing::info!(worker_id = %id, reason, "worker left");
            self.changed();
        }
    }

    /// Whether a worker of this role is known at `endpoint`.
    pub(crate) fn knows(&self, role: WorkerRole, endpoint: &str) -> bool {
        self.records()
            .by_id
            .iter()
            .any(|(id, record)| id.role == role && record.worker.endpoint == endpoint)
    }

    /// Workers of a role that take sessions, least loaded first.
    pub(crate) fn candidates(&self, role: WorkerRole) -> Vec<Worker> {
        let records = self.records();
        let mut open: Vec<_> = records
            .by_id
            .iter()
            .filter(|(id, record)| id.role == role && !record.load.draining)
            .map(|(_, record)| (record.fullness(), record.assigned, &record.worker))
            .collect();
        open.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        open.into_iter()
            .map(|(_, _, worker)| worker.clone())
            .collect()
    }

    /// Largest vocabulary among the verify workers.
    pub(crate) fn verify_vocab_size(&self) -> Option<usize> {
        let records = self.records();
        let verify = records
            .by_id
            .iter()
            .filter(|(id, _)| id.role == WorkerRole::Verify);
        verify
            .map(|(_, record)| record.worker.model.vocab_size as usize)
            .max()
    }

    /// Counts a session of this gateway to a worker until the assignment is dropped.
    pub(crate) fn assign(self: &Arc<Self>, id: WorkerId) -> Assignment {
        if let Some(record) = self.records().by_id.get_mut(&id) {
            record.assigned += 1;
        }
        Assignment {
            registry: Arc::clone(self),
            id,
        }
    }

    /// Every worker, for people.
    pub(crate) fn status(&self) -> Vec<WorkerStatus> {
        let records = self.records();
        records
            .by_id
            .iter()
            .map(|(id, record)| WorkerStatus {
                worker_id: id.to_string(),
                role: id.role.into(),
                endpoint: record.worker.endpoint.clone(),
                model: Some(ModelInfo::clone(&record.worker.model)),
                load: Some(record.load),
                heartbeat_age_ms: millis(record.heard),
                sessions_assigned: record.assigned,
            })
            .collect()
    }
}

/// A session's place at a worker.
pub(crate) struct Assignment {
    registry: Arc<Registry>,
    id: WorkerId,
}

impl Drop for Assignment {
    fn drop(&mut self) {
        if let Some(record) = self.registry.records().by_id.get_mut(&self.id) {
            record.assigned = record.assigned.saturating_sub(1);
        }
        self.registry.changed();
    }
}

/// Whole milliseconds since `instant`.
pub(crate) fn millis(instant: Instant) -> u64 {
    u64::try_from(instant.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Whether two tokenizer hashes are of different tokenizers; a checkpoint without one goes with any.
fn differs(a: &str, b: &str) -> bool {
    !a.is_empty() && !b.is_empty() && a != b
}

/// Why a draft model cannot propose to a target, if it cannot.
pub(crate) fn misfit(draft: &ModelInfo, target: &ModelInfo) -> Option<&'static str> {
    if draft.vocab_size != target.vocab_size {
        Some("vocabularies differ in size")
    } else if differs(&draft.tokenizer_hash, &target.tokenizer_hash) {
        Some("tokenizers differ")
    } else {
        None
    }
}

fn warn_of_misfit(a: WorkerId, a_model: &ModelInfo, b: WorkerId, b_model: &ModelInfo) {
    let (draft, draft_model, verify, target_model) = match (a.role, b.role) {
        (WorkerRole::Draft, WorkerRole::Verify) => (a, a_model, b, b_model),
        (WorkerRole::Verify, WorkerRole::Draft) => (b, b_model, a, a_model),
        _ => return,
    };
    if let Some(reason) = misfit(draft_model, target_model) {
        tracing::warn!(
            draft_worker = %draft,
            draft_model = draft_model.name,
            draft_vocab_size = draft_model.vocab_size,
            verify_worker = %verify,
            target_model = target_model.name,
            target_vocab_size = target_model.vocab_size,
            reason,
            "these workers cannot serve a session together"
        );
    }
}

#[cfg(test)]
mod tests;
