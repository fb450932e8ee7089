//! The gRPC edge: `VerifyService` in front of the engine thread.
//!
//! Handlers check what they are given, hand it over in one hop and stream what comes back. Nothing here waits for a
//! model, and one stream's fault ends that stream only.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use specattn_proto::v1::verify_service_server::VerifyService;
use specattn_proto::v1::{
    CloseRequest, CloseResponse, InspectRequest, InspectResponse, OpenRequest, OpenResponse,
    SpeculateRequest, SpeculateResponse, VerifyStatusRequest, VerifyStatusResponse,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_proto::{Capability, Fault, SessionId, limits, validate};
use specattn_service::trace::Parent;
use specattn_worker::{LoadGauge, ServedModel};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;
use tracing::field::{Empty, display};

use crate::draft_link::{LinkEvent, LinkId};
use crate::draft_reads::ClaimBound;
use crate::engine_loop::Command;
use crate::events::{self, Event, Events};
use crate::masks::LayerMaps;
use crate::trace::{SessionTrace, session_span};
use crate::wire;

/// Messages to one draft that may wait to be sent.
pub(crate) const LINK_EVENTS: usize = 16;

/// Messages of one draft that may wait for the engine.
pub(crate) const LINK_MESSAGES: usize = 4;

/// Longest wait for a draft's Join once its stream stands.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// The service's side of the worker.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) model: ServedModel,
    pub(crate) maps: LayerMaps,
    /// Least time between two messages of committed tokens of one session.
    pub(crate) commit_interval: Duration,
    pub(crate) load: Arc<LoadGauge>,
    pub(crate) draining: CancellationToken,
    pub(crate) links: AtomicU64,
}

impl Service {
    /// Sends the engine a command and waits for its answer.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, Fault>>) -> Command,
    ) -> Result<T, Fault> {
        let (reply, answer) = oneshot::channel();
        let gone = || Fault::Unavailable("the engine is gone".to_owned());
        self.commands
            .send(command(reply))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    async fn join(
        &self,
        inbound: &mut Streaming<SpeculateRequest>,
    ) -> Result<(Link, LinkEvents), Fault> {
        let first = tokio::time::timeout(JOIN_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Fault::DeadlineExceeded("no Join came".to_owned()))?
            .map_err(|status| unreadable(&status))?;
        let join = wire::join(first)?;
        let session = join.session_id.parse()?;
        let capability = Capability::from_wire(&join.capability)?;
        let draft = validate::model_info(join.draft_model)?;
        wire::check_vocabularies(&draft, &self.model.config)?;
        let map = self.maps.for_draft(&draft)?;
        let link = Link {
            session,
            bound: ClaimBound::new(&draft, limits::MAX_SESSION_TOKENS),
            id: LinkId(self.links.fetch_add(1, Ordering::Relaxed)),
            slots: Arc::new(Semaphore::new(LINK_MESSAGES)),
            commands: self.commands.clone(),
        };
        let (sender, receiver) = mpsc::channel(LINK_EVENTS);
        self.ask(|reply| Command::Join {
            session,
            link: link.id,
            capability,
            known_tokens: join.known_tokens,
            map,
            sender,
            slots: Arc::clone(&link.slots),
            reply,
        })
        .await?;
        Ok((link, LinkEvents { receiver }))
    }
}

#[tonic::async_trait]
impl VerifyService for Service {
    type OpenStream = OpenEvents;
    type SpeculateStream = LinkEvents;

    async fn open(&self, request: Request<OpenRequest>) -> Result<Response<OpenEvents>, Status> {
        if self.draining.is_cancelled() {
            return Err(Fault::Unavailable("the worker is draining".to_owned()).into());
        }
        let span = session_span();
        Parent::of(request.metadata().as_ref()).adopt(&span);
        let spec = wire::session_spec(request.into_inner(), &self.model.config)?;
        span.record("session_id", display(spec.id));
        let commands = self.commands.clone();
        // A full inbox means that the engine is about to look at its sessions anyway.
        let (outbox, events) =
            events::channel(spec.tokens.len(), self.commit_interval, move || {
                let _ = commands.try_send(Command::Sweep);
            });
        self.ask(|reply| Command::Open {
            spec: Box::new(spec),
            trace: SessionTrace::begin(span),
            outbox,
            reply,
        })
        .await?;
        Ok(Response::new(OpenEvents {
            events,
            kv_entry_bytes: self.model.info.kv_entry_bytes,
        }))
    }

    async fn speculate(
        &self,
        request: Request<Streaming<SpeculateRequest>>,
    ) -> Result<Response<LinkEvents>, Status> {
        let span = tracing::info_span!("speculate", session_id = Empty, trace_id = Empty);
        Parent::of(request.metadata().as_ref()).adopt(&span);
        let mut inbound = request.into_inner();
        let joining = self.join(&mut inbound).instrument(span.clone());
        let (link, events) = joining.await?;
        span.record("session_id", display(link.session));
        tokio::spawn(link.read(inbound).instrument(span));
        Ok(Response::new(events))
    }

    async fn close(
        &self,
        request: Request<CloseRequest>,
    ) -> Result<Response<CloseResponse>, Status> {
        let request = request.into_inner();
        let session: SessionId = request.session_id.parse()?;
        let ending = wire::ending(request.reason)?;
        self.ask(|reply| Command::Close {
            session,
            ending,
            reply,
        })
        .await?;
        Ok(Response::new(CloseResponse {}))
    }

    async fn inspect(
        &self,
        request: Request<InspectRequest>,
    ) -> Result<Response<InspectResponse>, Status> {
        let (session, columns) = wire::inspection(&request.into_inner())?;
        let map = self.ask(|reply| Command::Inspect {
            session,
            columns,
            reply,
        });
        Ok(Response::new(wire::kept_map(map.await?)))
    }

    async fn verify_status(
        &self,
        _request: Request<VerifyStatusRequest>,
    ) -> Result<Response<VerifyStatusResponse>, Status> {
        Ok(Response::new(VerifyStatusResponse {
            model: Some(self.model.info.clone()),
            load: Some(self.load.report(self.draining.is_cancelled())),
            protocol_version: PROTOCOL_VERSION,
        }))
    }
}

/// The reading side of a draft's stream.
struct Link {
    session: SessionId,
    /// On what the draft says it reads.
    bound: ClaimBound,
    id: LinkId,
    slots: Arc<Semaphore>,
    commands: mpsc::Sender<Command>,
}

impl Link {
    /// Hands proposals to the engine until the stream or the link ends.
    async fn read(self, mut inbound: Streaming<SpeculateRequest>) {
        let fault = loop {
            // Closed by the engine when it lets the draft go.
            let Ok(permit) = Arc::clone(&self.slots).acquire_owned().await else {
                return;
            };
            let part = match inbound.message().await {
                Ok(Some(request)) => wire::proposal_part(request, &self.bound),
                Ok(None) => break None,
                Err(status) => Err(unreadable(&status)),
            };
            let part = match part {
                Ok(part) => part,
                Err(fault) => break Some(fault),
            };
            let propose = Command::Propose {
                session: self.session,
                link: self.id,
                part,
                permit,
            };
            if self.commands.send(propose).await.is_err() {
                return;
            }
        };
        let leave = Command::Leave {
            session: self.session,
            link: self.id,
            fault,
        };
        // Without an engine there is nothing left to leave.
        let _ = self.commands.send(leave).await;
    }
}

/// Why a stream cannot be read on: a message that is none, or too long, is the sender's fault and not ours.
fn unreadable(status: &Status) -> Fault {
    match Fault::from_status(status) {
        Fault::Internal(reason) => Fault::InvalidArgument(reason),
        other => other,
    }
}

/// The `Open` stream.
pub(crate) struct OpenEvents {
    events: Events,
    /// Of the target.
    kv_entry_bytes: u32,
}

impl Stream for OpenEvents {
    type Item = Result<OpenResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = std::task::ready!(Pin::new(&mut self.events).poll_next(context));
        Poll::Ready(event.map(|event| {
            let progress = matches!(event, Event::Committed { .. }).then(|| self.events.progress());
            wire::open_response(event, progress, self.kv_entry_bytes).map_err(Status::from)
        }))
    }
}

/// The `Speculate` stream's answers.
pub(crate) struct LinkEvents {
    receiver: mpsc::Receiver<LinkEvent>,
}

impl Stream for LinkEvents {
    type Item = Result<SpeculateResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = std::task::ready!(self.receiver.poll_recv(context));
        Poll::Ready(event.map(|event| wire::speculate_response(event).map_err(Status::from)))
    }
}
