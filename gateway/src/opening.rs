//! Finding a verify worker for a session and opening it there, the first time and every time its worker was lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{CloseRequest, FinishReason, ModelInfo, OpenRequest, OpenResponse};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_proto::{Capability, Fault, limits};
use specattn_service::channel::Link;
use specattn_service::trace;
use tokio::time::Instant;
use tonic::Streaming;
use tracing::Instrument;

use crate::registry::{Assignment, Prefix, Registry, Worker, WorkerId};
use crate::verify_search::VerifySearch;

/// Longest wait for a verify worker's answer to Open, and what it gets even where patience is at its end.
const OPEN_TIMEOUT_LEAST: Duration = Duration::from_millis(500);
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A session that its verify worker welcomed.
pub(crate) struct OpenSession {
    pub(crate) worker: Worker,
    pub(crate) client: VerifyServiceClient<Link>,
    /// What follows Opened.
    pub(crate) events: Streaming<OpenResponse>,
    pub(crate) assignment: Assignment,
    /// What drafts must show to join it there.
    pub(crate) capability: Capability,
}

/// What to open, and where not.
pub(crate) struct Opening<'a> {
    pub(crate) registry: &'a Arc<Registry>,
    /// What to ask of a worker with this model, or why it is not to be asked.
    pub(crate) request: &'a (dyn Fn(&ModelInfo) -> Result<OpenRequest, Fault> + Sync),
    /// The tokens' first blocks: a worker may know them already.
    pub(crate) prefix: Prefix,
    /// Workers that broke the protocol in this session.
    pub(crate) barred: &'a BTreeSet<WorkerId>,
    /// Wait until then for a worker that has room.
    pub(crate) patience: Instant,
    /// Wait as long for a worker to come at all.
    pub(crate) waits_for_workers: bool,
}

impl Opening<'_> {
    /// Opens the session at the verify worker that suits it best and takes it.
    ///
    /// # Errors
    /// [`Fault::Unavailable`] when no verify worker is there or none answers, [`Fault::InvalidArgument`] when the prompt
    /// fits no model, otherwise what the last worker said.
    pub(crate) async fn open(&self) -> Result<OpenSession, Fault> {
        self.search().instrument(tracing::info_span!("open")).await
    }

    async fn search(&self) -> Result<OpenSession, Fault> {
        let mut changes = self.registry.changes();
        let prefix = self.prefix.clone();
        let mut search = VerifySearch::new(prefix, self.patience, self.waits_for_workers);
        loop {
            changes.mark_unchanged();
            if let Some(open) = self.ask_all(&mut search).await? {
                return Ok(open);
            }
            let pause = search.pause(Instant::now())?;
            tokio::time::sleep(pause.at_least).await;
            tokio::select! {
                // The registry outlives its sessions' tasks, which hold it: the wait cannot fail.
                _ = changes.changed() => {}
                () = tokio::time::sleep(pause.at_most) => {}
            }
        }
    }

    /// Asks one worker after another; none may take the session.
    async fn ask_all(&self, search: &mut VerifySearch) -> Result<Option<OpenSession>, Fault> {
        search.begin_round(self.registry);
        while let Some(worker) = search.next() {
            if self.barred.contains(&worker.id) {
                continue;
            }
            let request = match (self.request)(&worker.model) {
                Ok(request) => request,
                Err(misfit) => {
                    search.unfit(misfit);
                    continue;
                }
            };
            let worker_id = worker.id;
            let assignment = self.registry.assign(worker_id);
            let left = self.patience.saturating_duration_since(Instant::now());
            let timeout = left.clamp(OPEN_TIMEOUT_LEAST, OPEN_TIMEOUT);
            let opened = tokio::time::timeout(timeout, open_at(request, worker, assignment));
            let fault = match opened.await {
                Ok(Ok(open)) => {
                    search.opened(self.registry, worker_id);
                    return Ok(Some(open));
                }
                // That the gateway is refused is not for its client to hear.
                Ok(Err(Fault::Unauthenticated(why) | Fault::PermissionDenied(why))) => {
                    Fault::Unavailable(format!("{worker_id} refuses this gateway: {why}"))
                }
                Ok(Err(fault)) => fault,
                Err(_) => Fault::Unavailable(format!("{worker_id} does not answer")),
            };
            search.refused(self.registry, worker_id, fault)?;
        }
        Ok(None)
    }
}

async fn open_at(
    mut request: OpenRequest,
    worker: Worker,
    assignment: Assignment,
) -> Result<OpenSession, Fault> {
    // From a cryptographic generator, and for this opening alone: a draft of an earlier one cannot come back.
    let capability = Capability::from_bits(rand::random());
    request.draft_capability = capability.to_wire();
    request.protocol_version = PROTOCOL_VERSION;
    let status = |status: tonic::Status| Fault::from_status(&status);
    let mut client = VerifyServiceClient::new(worker.channel.clone())
        .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
    let mut events = match client
        .open(trace::request(request.clone()))
        .await
        .map_err(status)
    {
        // The worker has not noticed that this gateway lost it, or that another one died.
        Err(Fault::AlreadyExists(_)) => {
            let close = CloseRequest {
                session_id: request.session_id.clone(),
                reason: FinishReason::Error.into(),
            };
            match client.close(close).await.map_err(status) {
                Ok(_) | Err(Fault::NotFound(_)) => {}
                Err(fault) => return Err(fault),
            }
            client.open(trace::request(request)).await.map_err(status)?
        }
        opened => opened?,
    }
    .into_inner();
    let first = events.message().await.map_err(status)?;
    match first.and_then(|response| response.event) {
        Some(Event::Opened(_)) => Ok(OpenSession {
            worker,
            client,
            events,
            assignment,
            capability,
        }),
        None => Err(Fault::Unavailable(format!("{} hung up", worker.id))),
        Some(_) => Err(Fault::Internal(format!(
            "{} did not begin with Opened",
            worker.id
        ))),
    }
}
