//! Keeping a draft worker on a session.
//!
//! A session without one goes on alone, so nothing waits here for long and nothing here can end a session: when the
//! attached worker leaves, another is sought, and when none is to be had, the next change in the registry is awaited. When
//! a much less loaded one appears, or the attached one drains, the session moves.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::attach_response::Event;
use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::{AttachRequest, AttachResponse, DraftPolicy};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_proto::{Capability, Fault, limits};
use specattn_service::trace;
use tokio::time::Instant;
use tonic::Streaming;

use crate::draft_search::{DraftSearch, HELD, LOOK_AGAIN, SETTLE};
use crate::registry::{Assignment, Registry, Worker};
use crate::session_table::SessionEntry;
use crate::transcript::Transcript;

/// Longest wait for Attached: the draft worker connects to the verify worker in that time.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// What the search for draft workers needs to know of its session.
pub(crate) struct Attachment {
    pub(crate) entry: Arc<SessionEntry>,
    pub(crate) transcript: Arc<Transcript>,
    pub(crate) registry: Arc<Registry>,
    pub(crate) verify: Worker,
    /// What the draft must show there.
    pub(crate) capability: Capability,
    /// Its draft_length is at least 1.
    pub(crate) policy: DraftPolicy,
    pub(crate) max_tokens_total: u64,
}

/// How a draft worker's stay ended.
enum Left {
    Because(String),
    For(Box<(Worker, Assignment)>),
}

impl Attachment {
    /// Attaches one draft worker after another; ends only by being dropped, which detaches.
    pub(crate) async fn keep(self) -> Infallible {
        let mut changes = self.registry.changes();
        let mut search = DraftSearch::new();
        loop {
            changes.mark_unchanged();
            let now = Instant::now();
            let chosen = search.choose(&self.registry, &self.verify, now);
            let Some((worker, assignment)) = chosen else {
                let rested = search.rested();
                tokio::select! {
                    // The registry outlives its sessions' tasks, which hold it: the wait cannot fail.
                    _ = changes.changed() => {}
                    () = tokio::time::sleep_until(rested.unwrap_or(now)), if rested.is_some() => {}
                }
                continue;
            };
            let mut next = Some((worker, assignment));
            while let Some((worker, assignment)) = next.take() {
                let began = Instant::now();
                let id = worker.id;
                let reason = match self.attach(worker, assignment).await {
                    // A better one is there: the session moves at once.
                    Left::For(better) => {
                        tracing::info!(draft_worker = %id, "draft moves");
                        next = Some(*better);
                        continue;
                    }
                    Left::Because(reason) => reason,
                };
                self.entry.set_draft_worker(None);
                let stayed = began.elapsed();
                tokio::time::sleep(SETTLE).await;
                let pause = search.left(id, stayed, Instant::now());
                tracing::info!(
                    draft_worker = %id,
                    reason,
                    pause_ms = pause.as_millis(),
                    "no draft attached; the session goes on"
                );
            }
        }
    }

    /// Attaches `worker` and stays until it leaves or a better one is there.
    async fn attach(&self, worker: Worker, assignment: Assignment) -> Left {
        let mut assignment = assignment;
        let id = worker.id;
        let attaching = tokio::time::timeout(ATTACH_TIMEOUT, self.begin(worker));
        let mut events = match attaching.await {
            Ok(Ok(events)) => events,
            Ok(Err(fault)) => return Left::Because(fault.to_string()),
            Err(_) => return Left::Because("did not attach in time".to_owned()),
        };
        tracing::info!(draft_worker = %id, "draft attached");
        self.entry.set_draft_worker(Some(id));
        let mut changes = self.registry.changes();
        // Not before it has settled: a move costs the new draft a prompt.
        let mut next_look = Instant::now() + HELD;
        loop {
            tokio::select! {
                event = events.message() => match event {
                    Ok(Some(AttachResponse {
                        event: Some(Event::Detached(detached)),
                    })) => return Left::Because(detached.reason),
                    Ok(Some(_)) => {}
                    Ok(None) => return Left::Because("hung up".to_owned()),
                    Err(status) => {
                        return Left::Because(Fault::from_status(&status).to_string());
                    }
                },
                () = async {
                    tokio::time::sleep_until(next_look).await;
                    let _ = changes.changed().await;
                } => match self.registry.better_draft(&self.verify, assignment) {
                    Ok(better) => return Left::For(Box::new(better)),
                    Err(same) => {
                        assignment = same;
                        next_look = Instant::now() + LOOK_AGAIN;
                    }
                },
            }
        }
    }

    async fn begin(&self, worker: Worker) -> Result<Streaming<AttachResponse>, Fault> {
        let status = |status: tonic::Status| Fault::from_status(&status);
        let id = worker.id;
        let mut client = DraftServiceClient::new(worker.channel)
            .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
        let request = AttachRequest {
            session_id: self.entry.id.to_string(),
            verify_endpoint: self.verify.endpoint.clone(),
            token_ids: self.transcript.tokens(),
            policy: Some(self.policy),
            max_tokens_total: self.max_tokens_total,
            capability: self.capability.to_wire(),
            protocol_version: PROTOCOL_VERSION,
        };
        let mut events = client
            .attach(trace::request(request))
            .await
            .map_err(status)?
            .into_inner();
        match events.message().await.map_err(status)? {
            Some(AttachResponse {
                event: Some(Event::Attached(attached)),
            }) => {
                if attached.round_trip_us > 0 {
                    let round_trip = Duration::from_micros(attached.round_trip_us);
                    self.registry.heard_round_trip(id, &self.verify, round_trip);
                }
                Ok(events)
            }
            Some(AttachResponse {
                event: Some(Event::Detached(detached)),
            }) => Err(Fault::Unavailable(detached.reason)),
            _ => Err(Fault::Unavailable("hung up before it attached".to_owned())),
        }
    }
}
