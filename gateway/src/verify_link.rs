//! [`VerifyLink`]: a session's side of the verify worker that has it. Dropping it frees everything there.

use std::time::Duration;

use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{CloseRequest, FinishReason, OpenResponse, SessionFinished};
use specattn_proto::{Capability, Fault, SessionId};
use specattn_service::channel::Link;
use tokio::time::Instant;
use tonic::Streaming;

use crate::opening::OpenSession;
use crate::registry::{Assignment, Worker};

/// What a verify worker gets to end a session that it was asked to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The session's side of its verify worker.
pub(crate) struct VerifyLink {
    client: VerifyServiceClient<Link>,
    pub(crate) events: Streaming<OpenResponse>,
    pub(crate) worker: Worker,
    _assignment: Assignment,
    /// What drafts must show to join the session there.
    pub(crate) capability: Capability,
    /// Set once the worker was asked to close: when to stop waiting for it, and why it was asked.
    pub(crate) closing: Option<(Instant, FinishReason)>,
}

impl From<OpenSession> for VerifyLink {
    fn from(open: OpenSession) -> Self {
        Self {
            client: open.client,
            events: open.events,
            worker: open.worker,
            _assignment: open.assignment,
            capability: open.capability,
            closing: None,
        }
    }
}

impl VerifyLink {
    /// Asks the worker to end the session; its events tell when it has.
    pub(crate) fn close(&mut self, id: SessionId, reason: FinishReason) {
        let until = Instant::now() + CLOSE_TIMEOUT;
        self.closing = Some((until, reason));
        let worker = self.worker.id.to_string();
        let close = close(self.client.clone(), id, reason, worker);
        tokio::spawn(tokio::time::timeout_at(until, close));
    }

    /// The end of a session that was asked to close and whose worker did not answer: its last counters are unknown.
    pub(crate) fn unheard(&self) -> SessionFinished {
        let reason = self
            .closing
            .map_or(FinishReason::Error, |(_, reason)| reason);
        unheard(reason)
    }
}

/// An end without counters.
pub(crate) fn unheard(reason: FinishReason) -> SessionFinished {
    SessionFinished {
        reason: reason.into(),
        stats: None,
    }
}

async fn close(
    mut client: VerifyServiceClient<Link>,
    id: SessionId,
    reason: FinishReason,
    worker: String,
) {
    let request = CloseRequest {
        session_id: id.to_string(),
        reason: reason.into(),
    };
    match client.close(request).await {
        Ok(_) => {}
        Err(status) => match Fault::from_status(&status) {
            // It ended by itself meanwhile.
            Fault::NotFound(_) => {}
            fault => tracing::warn!(session_id = %id, worker, %fault, "closing the session failed"),
        },
    }
}
