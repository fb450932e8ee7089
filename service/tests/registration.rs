//! A worker stays registered: heartbeats, reconnects, says that it drains.
#![allow(clippy::unwrap_used)]

use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::register_request::Message;
use specattn_proto::v1::registry_service_server::{RegistryService, RegistryServiceServer};
use specattn_proto::v1::{
    RegisterRequest, RegisterResponse, StatusRequest, StatusResponse, WorkerLoad, WorkerRole,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::channel::Dialer;
use specattn_service::guard::Access;
use specattn_service::registration::{self, Worker};
use specattn_service::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// Hands every message to the test and hangs up after `beats` of them.
struct Registry {
    seen: Mutex<mpsc::Sender<Message>>,
    beats: usize,
}

type Answers = Pin<Box<dyn Stream<Item = Result<RegisterResponse, Status>> + Send>>;

#[tonic::async_trait]
impl RegistryService for Registry {
    type RegisterStream = Answers;

    async fn register(
        &self,
        request: Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let (answers, receiver) = mpsc::channel(4);
        let seen = self.seen.lock().unwrap().clone();
        let mut requests = request.into_inner().take(self.beats);
        tokio::spawn(async move {
            let answer = RegisterResponse {
                worker_id: "verify-1".to_owned(),
                heartbeat_interval_ms: 20,
                protocol_version: PROTOCOL_VERSION,
            };
            answers.send(Ok(answer)).await.unwrap();
            while let Some(Ok(request)) = requests.next().await {
                seen.send(request.message.unwrap()).await.unwrap();
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Fault::NotFound("not asked here".to_owned()).into())
    }
}

#[tokio::test]
async fn registers_beats_and_returns() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = ServerConfig::default().endpoint(&listener).unwrap();
    let (sender, mut seen) = mpsc::channel(16);
    let registry = Registry {
        seen: Mutex::new(sender),
        beats: 4,
    };
    let shutdown = CancellationToken::new();
    let config = ServerConfig {
        drain_timeout: Duration::from_millis(50),
        ..ServerConfig::default()
    };
    let server_shutdown = shutdown.clone();
    let server = tokio::spawn(async move {
        Server::new()
            .with(RegistryServiceServer::new(registry), Access::Peers)
            .serve(listener, &config, server_shutdown)
            .await
    });

    let (draining, stopped) = (CancellationToken::new(), CancellationToken::new());
    let worker = Worker {
        gateway,
        dialer: Dialer::default(),
        role: WorkerRole::Verify,
        endpoint: "http://127.0.0.1:1".to_owned(),
        model: Default::default(),
    };
    let load = || WorkerLoad {
        sessions_max: 8,
        ..Default::default()
    };
    let run = tokio::spawn(registration::run(
        worker,
        load,
        draining.clone(),
        stopped.clone(),
    ));

    let mut registrations = 0;
    let mut beats = 0;
    let deadline = Duration::from_secs(10);
    while registrations < 2 || beats < 4 {
        let message = tokio::time::timeout(deadline, seen.recv()).await.unwrap();
        match message.unwrap() {
            Message::Registration(it) => {
                assert_eq!(it.role(), WorkerRole::Verify);
                registrations += 1;
            }
            Message::Heartbeat(it) => {
                assert_eq!(it.load.unwrap().sessions_max, 8);
                beats += 1;
            }
        }
    }
    draining.cancel();
    loop {
        let message = tokio::time::timeout(deadline, seen.recv()).await.unwrap();
        let load = match message.unwrap() {
            Message::Registration(it) => it.load,
            Message::Heartbeat(it) => it.load,
        };
        if load.unwrap().draining {
            break;
        }
    }
    stopped.cancel();
    run.await.unwrap();
    shutdown.cancel();
    let drained = tokio::time::timeout(deadline, server).await;
    drained.expect("the drain ends").unwrap().unwrap();
}
