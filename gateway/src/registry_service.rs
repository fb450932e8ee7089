//! `RegistryService`: workers make themselves known; people ask how things are.

use std::sync::Arc;

use specattn_proto::Fault;
use specattn_proto::v1::register_request::Message;
use specattn_proto::v1::registry_service_server::RegistryService;
use specattn_proto::v1::{
    GatewayStatus, RegisterRequest, RegisterResponse, StatusRequest, StatusResponse, WorkerLoad,
};
use specattn_proto::version::{self, PROTOCOL_VERSION};
use specattn_service::guard::Member;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::Gateway;
use crate::clients::may_register;
use crate::log::SessionLog;
use crate::registry::{Registry, WorkerId};

/// Silent heartbeat intervals after which a worker is gone.
const MISSED_HEARTBEATS: u32 = 3;

#[tonic::async_trait]
impl RegistryService for Gateway {
    type RegisterStream = ReceiverStream<Result<RegisterResponse, Status>>;

    async fn register(
        &self,
        request: Request<Streaming<RegisterRequest>>,
    ) -> Result<Response<Self::RegisterStream>, Status> {
        let member = request.extensions().get::<Member>().copied();
        let mut requests = request.into_inner();
        let silence = self.config.heartbeat_interval * MISSED_HEARTBEATS;
        let first = tokio::time::timeout(silence, requests.message())
            .await
            .map_err(|_| Fault::DeadlineExceeded("no registration came".to_owned()))??;
        let Some(Message::Registration(registration)) = first.and_then(|first| first.message)
        else {
            let text = "the first message must be a registration".to_owned();
            return Err(Fault::InvalidArgument(text).into());
        };
        may_register(member.as_ref(), registration.role())?;
        version::check(registration.protocol_version).inspect_err(|fault| {
            let (endpoint, build) = (&registration.endpoint, &registration.build);
            tracing::warn!(endpoint, build, %fault, "worker of another release");
        })?;
        let id = self.registry.add(
            registration.role(),
            registration.endpoint,
            registration.model,
            registration.load.unwrap_or_default(),
        )?;
        let membership = Membership {
            registry: Arc::clone(&self.registry),
            id,
        };

        let (sender, receiver) = mpsc::channel(1);
        let interval_ms = self.config.heartbeat_interval.as_millis();
        let answer = RegisterResponse {
            worker_id: id.to_string(),
            heartbeat_interval_ms: u32::try_from(interval_ms).unwrap_or(u32::MAX),
            protocol_version: PROTOCOL_VERSION,
        };
        let shutdown = self.shutdown.clone();
        self.tasks.spawn(async move {
            if sender.send(Ok(answer)).await.is_err() {
                return membership.end("hung up at once");
            }
            loop {
                let beat = tokio::select! {
                    beat = tokio::time::timeout(silence, requests.message()) => beat,
                    () = shutdown.cancelled() => return membership.end("the gateway drains"),
                };
                let load = match beat {
                    Err(_) => return membership.end("missed its heartbeats"),
                    Ok(Err(_)) => return membership.end("its connection broke"),
                    Ok(Ok(None)) => return membership.end("hung up"),
                    Ok(Ok(Some(request))) => heartbeat(request),
                };
                match load {
                    Some(load) if membership.registry.report(id, load) => {}
                    Some(_) => return membership.end("was replaced"),
                    None => {
                        let fault = Fault::InvalidArgument("heartbeats must follow".to_owned());
                        // A worker that does not listen any more needs no reason.
                        drop(sender.try_send(Err(fault.into())));
                        return membership.end("sent something else than heartbeats");
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(
        &self,
        _request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse {
            workers: self.registry.status(),
            sessions: self.sessions.status(),
            gateway: Some(self.gateway_status()),
        }))
    }
}

impl Gateway {
    fn gateway_status(&self) -> GatewayStatus {
        let (log_bytes, log_sessions) = self.log.as_ref().map_or((0, 0), SessionLog::usage);
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        GatewayStatus {
            requests_queued: count(self.admission.queued() as u64),
            log_bytes,
            log_sessions: count(log_sessions),
        }
    }
}

fn heartbeat(request: RegisterRequest) -> Option<WorkerLoad> {
    match request.message {
        Some(Message::Heartbeat(heartbeat)) => Some(heartbeat.load.unwrap_or_default()),
        Some(Message::Registration(_)) | None => None,
    }
}

/// A registered worker's stay; it ends with the stream, however that ends.
struct Membership {
    registry: Arc<Registry>,
    id: WorkerId,
}

impl Membership {
    fn end(self, reason: &str) {
        self.registry.remove(self.id, reason);
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.registry.remove(self.id, "its stream was dropped");
    }
}
