//! [`Registry`]: the workers that exist now, how loaded they are, and which to take.
//!
//! A session goes to the least loaded worker; to a verify worker that has served its prefix, while that is not much more
//! loaded than the others; to a draft worker with a short way to its verify worker. Workers that did not answer a session
//! come last until they are heard of again.
//!
//! Workers come from registration streams and from lists of endpoints alike; whoever brings one in also removes it. An
//! endpoint is in the registry once per role: a worker that comes back before its old entry is gone replaces it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use specattn_proto::v1::{ModelInfo, WorkerLoad, WorkerRole, WorkerStatus};
use specattn_proto::{Fault, validate};
use specattn_service::channel::{Dialer, Link};
use tokio::sync::watch;

use crate::args::Config;
pub(crate) use crate::prefix::Prefix;
use crate::prefix::Prefixes;

/// Most workers of one gateway.
const MAX_WORKERS: usize = 1_024;

/// How much fuller than the least loaded worker one may be, for each token of a session's prefix that it holds, and at most:
/// a prompt of 4,096 tokens is worth a quarter of a worker, one of 256 a sixtieth.
const PREFIX_ADVANTAGE_PER_TOKEN: f64 = 0.25 / 4_096.0;
const PREFIX_ADVANTAGE_MOST: f64 = 0.25;

/// Names a stay of a worker in the registry; one that leaves and returns gets another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerId {
    role: WorkerRole,
    number: u64,
}

#[cfg(test)]
impl WorkerId {
    pub(crate) fn verify(number: u64) -> Self {
        let role = WorkerRole::Verify;
        Self { role, number }
    }
}

impl WorkerId {
    fn role_name(self) -> &'static str {
        match self.role {
            WorkerRole::Verify => "verify",
            WorkerRole::Draft => "draft",
            WorkerRole::Unspecified => "worker",
        }
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.role_name(), self.number)
    }
}

/// A worker as sessions use it.
#[derive(Debug, Clone)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) endpoint: String,
    pub(crate) model: Arc<ModelInfo>,
    /// Connects when first used, and again after a loss.
    pub(crate) channel: Link,
}

struct Record {
    worker: Worker,
    load: WorkerLoad,
    heard: Instant,
    /// Sessions of this gateway.
    assigned: u32,
    /// Sessions of others: what the last two reports both had beyond this gateway's own. Sessions begin and end while a report
    /// is on its way, so that one alone may count some that are none.
    others: u32,
    /// The same by the last report alone.
    told_others: u32,
    /// It did not answer a session since it was heard of last.
    suspect: bool,
    /// Of a draft worker: its ways to verify workers, by endpoint.
    ways: BTreeMap<String, drafts::Way>,
}

impl Record {
    /// How full the worker is. Below 1 there is room.
    fn fullness(&self) -> f64 {
        self.fullness_with(self.assigned)
    }

    /// How full it were with another number of this gateway's sessions.
    fn fullness_with(&self, assigned: u32) -> f64 {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let sessions = assigned.saturating_add(self.others);
        let slots = share(sessions.into(), self.load.sessions_max.into());
        // It said so of the sessions that it had then. Block counts are far below 2^52: the conversion is exact.
        let then = f64::from(self.load.sessions_active.max(1));
        let blocks = self.load.kv_blocks_used as f64 * f64::from(sessions) / then;
        slots.max(share(blocks, self.load.kv_blocks_total as f64))
    }

    /// Takes a report.
    fn hear(&mut self, load: WorkerLoad) {
        let others = load.sessions_active.saturating_sub(self.assigned);
        self.others = others.min(self.told_others);
        self.told_others = others;
        self.load = load;
        self.heard = Instant::now();
        self.suspect = false;
    }

    fn takes_sessions(&self) -> bool {
        !self.load.draining
    }
}

#[derive(Default)]
struct Records {
    by_id: BTreeMap<WorkerId, Record>,
    prefixes: Prefixes,
    last_number: u64,
}

/// How workers of each role are called.
#[derive(Debug, Default)]
pub(crate) struct Dialers {
    verify: Dialer,
    draft: Dialer,
}

impl Dialers {
    pub(crate) fn new(config: &Config) -> Self {
        let dialer = |role| config.access.dialer(&config.server.security, role);
        Self {
            verify: dialer(WorkerRole::Verify),
            draft: dialer(WorkerRole::Draft),
        }
    }
}

/// The workers of a gateway.
pub(crate) struct Registry {
    /// SHA-256 of the gateway's tokenizer.json: verify workers must run a model that goes with it.
    tokenizer_hash: String,
    dialers: Dialers,
    records: Mutex<Records>,
    /// Counts the changes that may bring a new choice.
    changes: watch::Sender<u64>,
}

impl Registry {
    pub(crate) fn new(tokenizer_hash: String, dialers: Dialers) -> Self {
        Self {
            tokenizer_hash,
            dialers,
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

    /// A link to the worker of this role at `endpoint`. Needs a running Tokio runtime.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when that is no http or https URI.
    pub(crate) fn link(&self, role: WorkerRole, endpoint: &str) -> Result<Link, Fault> {
        match role {
            WorkerRole::Draft => self.dialers.draft.connect_lazy(endpoint),
            _ => self.dialers.verify.connect_lazy(endpoint),
        }
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
        let channel = self.link(role, &endpoint)?;
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
            others: load.sessions_active,
            told_others: load.sessions_active,
            suspect: false,
            ways: BTreeMap::new(),
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
        let resized = load.sessions_max != record.load.sessions_max;
        let was_suspect = record.suspect;
        record.hear(load);
        let gained_room = record.fullness() < before || was_suspect;
        drop(records);
        if drains {
            tracing::info!(worker_id = %id, "worker drains");
        }
        if gained_room || drains || resized {
            self.changed();
        }
        true
    }

    /// Takes a worker out.
    pub(crate) fn remove(&self, id: WorkerId, reason: &str) {
        let mut records = self.records();
        if records.by_id.remove(&id).is_some() {
            records.prefixes.forget(id);
            drop(records);
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

    /// Verify workers that take sessions, the best for one with this prefix first.
    pub(crate) fn verify_candidates(&self, prefix: &Prefix) -> Vec<Worker> {
        let records = self.records();
        let open = records
            .by_id
            .iter()
            .filter(|(id, record)| id.role == WorkerRole::Verify && record.takes_sessions());
        let mut open: Vec<_> = open.collect();
        open.sort_by(|(_, a), (_, b)| {
            let by_load = a.fullness().total_cmp(&b.fullness());
            let by_trust = a.suspect.cmp(&b.suspect);
            by_trust.then(by_load).then(a.assigned.cmp(&b.assigned))
        });
        let least = open.first().map_or(0.0, |(_, record)| record.fullness());
        let knows = records.prefixes.worker(prefix).and_then(|(knows, tokens)| {
            let advantage = PREFIX_ADVANTAGE_PER_TOKEN * tokens as f64;
            let most = least + advantage.min(PREFIX_ADVANTAGE_MOST);
            open.iter().position(|(id, record)| {
                let close = record.fullness() <= most && record.fullness() < 1.0;
                **id == knows && close && !record.suspect
            })
        });
        if let Some(at) = knows {
            open[..=at].rotate_right(1);
        }
        open.into_iter()
            .map(|(_, record)| record.worker.clone())
            .collect()
    }

    /// A worker that is here.
    pub(crate) fn worker(&self, id: WorkerId) -> Option<Worker> {
        let records = self.records();
        records.by_id.get(&id).map(|record| record.worker.clone())
    }

    /// A verify worker holds a session with this prefix now.
    pub(crate) fn served(&self, id: WorkerId, prefix: &Prefix) {
        self.records().prefixes.served(prefix, id);
    }

    /// A worker did not answer.
    pub(crate) fn suspect(&self, id: WorkerId) {
        if let Some(record) = self.records().by_id.get_mut(&id) {
            record.suspect = true;
        }
    }

    /// Sessions that the verify workers take at most; as good as no limit where that is not known, or none is there: then
    /// requests are refused and do not wait.
    pub(crate) fn places(&self) -> usize {
        let records = self.records();
        let verify = records
            .by_id
            .iter()
            .filter(|(id, record)| id.role == WorkerRole::Verify && record.takes_sessions());
        let mut places = 0_usize;
        for (_, record) in verify {
            match record.load.sessions_max {
                0 => return usize::MAX,
                most => places = places.saturating_add(most as usize),
            }
        }
        if places == 0 { usize::MAX } else { places }
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
        self.assignment(id)
    }

    fn assignment(self: &Arc<Self>, id: WorkerId) -> Assignment {
        Assignment {
            registry: Arc::clone(self),
            id,
        }
    }

    /// How many workers there are of each role, by whether they take sessions.
    pub(crate) fn census(&self) -> BTreeMap<(&'static str, &'static str), u32> {
        let mut count = BTreeMap::new();
        for role in ["verify", "draft"] {
            for state in ["ready", "draining", "suspect"] {
                count.insert((role, state), 0);
            }
        }
        for (id, record) in &self.records().by_id {
            let state = match record {
                _ if record.load.draining => "draining",
                _ if record.suspect => "suspect",
                _ => "ready",
            };
            *count.entry((id.role_name(), state)).or_default() += 1;
        }
        count
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

mod drafts;
#[cfg(test)]
mod tests;
