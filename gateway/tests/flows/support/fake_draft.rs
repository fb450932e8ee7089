//! A draft worker that attaches and stays.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use specattn_proto::Fault;
use specattn_proto::v1::attach_response::Event;
use specattn_proto::v1::draft_service_server::{DraftService, DraftServiceServer};
use specattn_proto::v1::{
    AttachRequest, AttachResponse, Attached, DraftStatusRequest, DraftStatusResponse, ModelInfo,
    WorkerLoad, WorkerRole,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::guard::Access;
use specattn_service::server::Server;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Running, model, serve_worker};

/// The worker; a clone tells what happened.
#[derive(Clone)]
pub(crate) struct FakeDraft {
    pub(crate) model: ModelInfo,
    /// Refuses every session.
    pub(crate) full: bool,
    attached: Arc<Mutex<Vec<AttachRequest>>>,
}

impl FakeDraft {
    pub(crate) fn new() -> Self {
        Self {
            model: model(),
            full: false,
            attached: Arc::default(),
        }
    }

    pub(crate) async fn start(&self, gateway: Option<&str>) -> Running {
        let service = DraftServiceServer::new(self.clone());
        let server = Server::new().with(service, Access::Everyone);
        serve_worker(server, WorkerRole::Draft, self.model.clone(), gateway).await
    }

    /// Every Attach that came.
    pub(crate) fn attached(&self) -> Vec<AttachRequest> {
        self.attached.lock().unwrap().clone()
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<AttachResponse, Status>> + Send>>;

#[tonic::async_trait]
impl DraftService for FakeDraft {
    type AttachStream = Events;

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<Events>, Status> {
        self.attached.lock().unwrap().push(request.into_inner());
        if self.full {
            return Err(Fault::exhausted("no room").into());
        }
        let (sender, receiver) = mpsc::channel(1);
        let attached = AttachResponse {
            event: Some(Event::Attached(Attached::default())),
        };
        sender.try_send(Ok(attached)).unwrap();
        // Stays until the gateway drops the stream.
        tokio::spawn(async move { sender.closed().await });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn draft_status(
        &self,
        _: Request<DraftStatusRequest>,
    ) -> Result<Response<DraftStatusResponse>, Status> {
        Ok(Response::new(DraftStatusResponse {
            model: Some(self.model.clone()),
            load: Some(WorkerLoad::default()),
            protocol_version: PROTOCOL_VERSION,
        }))
    }
}
