//! Keeping a draft worker on a session.
//!
//! A session without one goes on alone, so nothing waits here for long and nothing here can end a session: when the
//! attached worker leaves, another is sought, and when none is to be had, the next change in the registry is awaited. When
//! a much less loaded one appears, or the attached one drains, the session moves.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::attach_response::Event;
use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::{AttachRequest, AttachResponse, DraftPolicy};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_proto::{Capability, Fault, limits};
use specattn_service::{Backoff, trace};
use tokio::time::Instant;
use tonic::Streaming;

use crate::registry::{Assignment, Registry, Worker, WorkerId};
use crate::session_table::SessionEntry;
use crate::transcript::Transcript;

/// Longest wait for Attached: the draft worker connects to the verify worker in that time.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);

/// First and longest pause after a draft worker refused or left.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// An attachment that held this long is a success: the next pause is short again.
const HELD: Duration = Duration::from_secs(1);

/// Pause between two looks for a better draft worker: changes of the registry come with every session that begins or ends.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Pause before an ended attachment counts as lost: the session's own end detaches too, and ends this search.
const SETTLE: Duration = Duration::from_millis(20);

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
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        // Workers that refused or left, and when to ask them again.
        let mut resting: BTreeMap<WorkerId, Instant> = BTreeMap::new();
        loop {
            changes.mark_unchanged();
            let now = Instant::now();
            resting.retain(|_, until| *until > now);
            let Some((worker, assignment)) = self.choose(&resting) else {
                let rested = resting.values().min().copied();
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
    }

    /// The draft worker that suits the session best and is not resting.
    fn choose(&self, resting: &BTreeMap<WorkerId, Instant>) -> Option<(Worker, Assignment)> {
        self.registry
            .assign_draft(&self.verify, |id| !resting.contains_key(&id))
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
