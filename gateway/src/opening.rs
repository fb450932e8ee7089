//! Finding a verify worker for a session and opening it there.

use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{OpenResponse, WorkerRole};
use specattn_proto::{Fault, SessionId, limits};
use tonic::Streaming;
use tonic::transport::Channel;

use crate::plan::Plan;
use crate::registry::{Assignment, Registry, Worker};

/// Longest wait for a verify worker's answer to Open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A session that its verify worker welcomed.
pub(crate) struct OpenSession {
    pub(crate) worker: Worker,
    pub(crate) client: VerifyServiceClient<Channel>,
    /// What follows Opened.
    pub(crate) events: Streaming<OpenResponse>,
    pub(crate) assignment: Assignment,
}

/// Opens the session at the least loaded verify worker that takes it.
///
/// # Errors
/// [`Fault::Unavailable`] when no verify worker is there or none answers, [`Fault::InvalidArgument`] when the prompt
/// fits no model, otherwise what the last worker said.
pub(crate) async fn open(
    plan: &Plan,
    id: SessionId,
    registry: &Arc<Registry>,
) -> Result<OpenSession, Fault> {
    let mut refusal = Fault::Unavailable("no verify worker is there".to_owned());
    for worker in registry.candidates(WorkerRole::Verify) {
        if let Err(misfit) = plan.fits(&worker.model) {
            refusal = misfit.into();
            continue;
        }
        let worker_id = worker.id;
        let assignment = registry.assign(worker_id);
        let opened = tokio::time::timeout(OPEN_TIMEOUT, open_at(plan, id, worker, assignment));
        let fault = match opened.await {
            Ok(Ok(open)) => return Ok(open),
            Ok(Err(fault)) => fault,
            Err(_) => Fault::Unavailable(format!("{worker_id} does not answer")),
        };
        tracing::warn!(session_id = %id, %worker_id, %fault, "verify worker did not open the session");
        // A full worker says nothing about the next one; nor does one that is gone.
        let elsewhere = matches!(
            fault,
            Fault::ResourceExhausted { .. } | Fault::Unavailable(_) | Fault::Internal(_)
        );
        if !elsewhere {
            return Err(fault);
        }
        refusal = fault;
    }
    Err(refusal)
}

async fn open_at(
    plan: &Plan,
    id: SessionId,
    worker: Worker,
    assignment: Assignment,
) -> Result<OpenSession, Fault> {
    let status = |status: tonic::Status| Fault::from_status(&status);
    let mut client = VerifyServiceClient::new(worker.channel.clone())
        .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
    let mut events = client
        .open(plan.open_request(id))
        .await
        .map_err(status)?
        .into_inner();
    let first = events.message().await.map_err(status)?;
    match first.and_then(|response| response.event) {
        Some(Event::Opened(_)) => Ok(OpenSession {
            worker,
            client,
            events,
            assignment,
        }),
        None => Err(Fault::Unavailable(format!("{} hung up", worker.id))),
        Some(_) => Err(Fault::Internal(format!(
            "{} did not begin with Opened",
            worker.id
        ))),
    }
}
