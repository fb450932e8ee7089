//! Keeping a draft worker on a session.
//!
//! A session without one goes on alone, so nothing waits here for long and nothing here can end a session: when the
//! attached worker leaves, another is sought, and when none is to be had, the next change in the registry is awaited.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::attach_response::Event;
use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::{AttachRequest, AttachResponse, DraftPolicy, WorkerRole};
use specattn_proto::{Fault, limits};
use specattn_service::Backoff;
use tokio::time::Instant;
use tonic::Streaming;

use crate::registry::{Registry, Worker, WorkerId, misfit};
use crate::session_table::SessionEntry;

/// Longest wait for Attached: the draft worker connects to the verify worker in that time.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// First and longest pause after a draft worker refused or left.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// An attachment that held this long is a success: the next pause is short again.
const HELD: Duration = Duration::from_secs(1);

/// Pause before an ended attachment counts as lost: the session's own end detaches too, and ends this search.
const SETTLE: Duration = Duration::from_millis(20);

/// What the search for draft workers needs to know of its session.
pub(crate) struct Attachment {
    pub(crate) entry: Arc<SessionEntry>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) verify: Worker,
    /// Its draft_length is at least 1.
    pub(crate) policy: DraftPolicy,
    pub(crate) max_tokens_total: u64,
}

impl Attachment {
    /// Attaches one draft worker after another; ends only by being dropped, which detaches.
    pub(crate) async fn keep(self) -> Infallible {
        let mut changes = self.registry.changes();
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        // Workers that refused or left, and when to ask them again.
        let mut resting: BTreeMap<WorkerId, Instant> = BTreeMap::new();
        loop {
            changes.mark_unchanged();
            let now = Instant::now();
            resting.retain(|_, until| *until > now);
            let Some(worker) = self.choose(&resting) else {
                let rested = resting.values().min().copied();
                tokio::select! {
                    // The registry outlives its sessions' tasks, which hold it: the wait cannot fail.
                    _ = changes.changed() => {}
                    () = tokio::time::sleep_until(rested.unwrap_or(now)), if rested.is_some() => {}
                }
                continue;
            };
            let began = Instant::now();
            let id = worker.id;
            let reason = self.attach(worker).await;
            self.entry.set_draft_worker(None);
            if began.elapsed() >= HELD {
                backoff.reset();
            }
            tokio::time::sleep(SETTLE).await;
            let pause = backoff.delay();
            tracing::info!(
                draft_worker = %id,
                reason,
                pause_ms = pause.as_millis(),
                "no draft attached; the session goes on"
            );
            resting.insert(id, Instant::now() + pause);
        }
    }

    /// The least loaded draft worker that fits the target and is not resting.
    fn choose(&self, resting: &BTreeMap<WorkerId, Instant>) -> Option<Worker> {
        self.registry
            .candidates(WorkerRole::Draft)
            .into_iter()
            .find(|worker| {
                !resting.contains_key(&worker.id)
                    && misfit(&worker.model, &self.verify.model).is_none()
            })
    }

    /// Attaches `worker` and stays until it leaves; says why it did.
    async fn attach(&self, worker: Worker) -> String {
        let _assignment = self.registry.assign(worker.id);
        let id = worker.id;
        let attaching = tokio::time::timeout(ATTACH_TIMEOUT, self.begin(worker));
        let mut events = match attaching.await {
            Ok(Ok(events)) => events,
            Ok(Err(fault)) => return fault.to_string(),
            Err(_) => return "did not attach in time".to_owned(),
        };
        tracing::info!(draft_worker = %id, "draft attached");
        self.entry.set_draft_worker(Some(id));
        loop {
            match events.message().await {
                Ok(Some(AttachResponse {
                    event: Some(Event::Detached(detached)),
                })) => return detached.reason,
                Ok(Some(_)) => {}
                Ok(None) => return "hung up".to_owned(),
                Err(status) => return Fault::from_status(&status).to_string(),
            }
        }
    }

    async fn begin(&self, worker: Worker) -> Result<Streaming<AttachResponse>, Fault> {
        let status = |status: tonic::Status| Fault::from_status(&status);
        let mut client = DraftServiceClient::new(worker.channel)
            .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
        let request = AttachRequest {
            session_id: self.entry.id.to_string(),
            verify_endpoint: self.verify.endpoint.clone(),
            token_ids: self.entry.tokens(),
            policy: Some(self.policy),
            max_tokens_total: self.max_tokens_total,
        };
        let mut events = client.attach(request).await.map_err(status)?.into_inner();
        match events.message().await.map_err(status)? {
            Some(AttachResponse {
                event: Some(Event::Attached(_)),
            }) => Ok(events),
            Some(AttachResponse {
                event: Some(Event::Detached(detached)),
            }) => Err(Fault::Unavailable(detached.reason)),
            _ => Err(Fault::Unavailable("hung up before it attached".to_owned())),
        }
    }
}
