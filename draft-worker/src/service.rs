//! The gRPC edge: `DraftService` in front of the engine thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::draft_service_server::DraftService;
use specattn_proto::v1::{AttachRequest, AttachResponse, DraftStatusRequest, DraftStatusResponse};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::trace::Parent;
use specattn_worker::{LoadGauge, ServedModel};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::Instrument;
use tracing::field::{Empty, display};

use crate::args::Drafting;
use crate::channels::Channels;
use crate::engine_loop::{Command, NewSession, SessionKey};
use crate::link::{EngineSession, Link};
use crate::metrics::Totals;
use crate::outgoing::Outgoing;
use crate::wire::{self, Attach};

/// Proposal messages that may wait to be sent: three of the round under way, and those of rounds given up or drafted ahead meanwhile.
pub(crate) const PROPOSALS: usize = 16;

/// Events of an `Attach` stream: there are two.
const ATTACH_EVENTS: usize = 2;

/// The service's side of the worker.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) model: ServedModel,
    pub(crate) drafting: Drafting,
    pub(crate) channels: Channels,
    pub(crate) load: Arc<LoadGauge>,
    pub(crate) draining: CancellationToken,
    pub(crate) sessions: AtomicU64,
    pub(crate) totals: Totals,
}

type AttachStream = ReceiverStream<Result<AttachResponse, Status>>;

impl Service {
    /// Joins a session; measures meanwhile how far its verify worker is.
    async fn take_up(&self, attach: Attach) -> Result<(Link, Option<Duration>), Fault> {
        let route = self.channels.get(&attach.endpoint)?;
        let (proposals, outbound) = mpsc::channel(PROPOSALS);
        let (failed, failure) = oneshot::channel();
        let (reply, opened) = oneshot::channel();
        let engine = EngineSession {
            key: SessionKey(self.sessions.fetch_add(1, Ordering::Relaxed)),
            commands: self.commands.clone(),
            abandoned: Arc::new(AtomicBool::new(false)),
        };
        let session = Box::new(NewSession {
            key: engine.key,
            spec: attach.spec,
            proposals,
            failed,
            abandoned: Arc::clone(&engine.abandoned),
        });
        let gone = || Fault::Unavailable("the engine is gone".to_owned());
        let open = Command::Open { session, reply };
        self.commands.send(open).await.map_err(|_| gone())?;
        opened.await.map_err(|_| gone())??;
        // The engine catches up with the tokens while the link is made.
        let outbound = Outgoing::new(self.totals.clone()).messages(outbound);
        let (to, joining) = (route.link.clone(), attach.joining);
        let joined = Link::join(to, joining, &self.model, engine, outbound, failure);
        tokio::try_join!(joined, async { Ok(route.round_trip().await) })
    }
}

#[tonic::async_trait]
impl DraftService for Service {
    type AttachStream = AttachStream;

    async fn attach(
        &self,
        request: Request<AttachRequest>,
    ) -> Result<Response<AttachStream>, Status> {
        if self.draining.is_cancelled() {
            return Err(Fault::Unavailable("the worker is draining".to_owned()).into());
        }
        let span = tracing::info_span!("draft", session_id = Empty, trace_id = Empty);
        Parent::of(request.metadata().as_ref()).adopt(&span);
        let attach = wire::attach(request.into_inner(), &self.model.config, self.drafting)?;
        span.record("session_id", display(attach.joining.session));
        let taken_up = self.take_up(attach).instrument(span.clone());
        let (link, round_trip) = taken_up.await?;
        let (events, stream) = mpsc::channel(ATTACH_EVENTS);
        events
            .try_send(Ok(wire::attached(round_trip)))
            .map_err(|_| Fault::Internal("a fresh channel has no room".to_owned()))?;
        tokio::spawn(link.run(events).instrument(span));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn draft_status(
        &self,
        _request: Request<DraftStatusRequest>,
    ) -> Result<Response<DraftStatusResponse>, Status> {
        Ok(Response::new(DraftStatusResponse {
            model: Some(self.model.info.clone()),
            load: Some(self.load.report(self.draining.is_cancelled())),
            protocol_version: PROTOCOL_VERSION,
        }))
    }
}
