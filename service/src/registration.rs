//! A worker's side of `RegistryService.Register`: stay registered for as long as the worker lives.
//!
//! One stream is open at a time. When it breaks, the gateway has forgotten the worker or soon will, and the worker
//! registers anew after a growing, jittered delay.

use std::time::Duration;

use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_proto::v1::{
    Heartbeat, ModelInfo, RegisterRequest, Registration, WorkerLoad, WorkerRole, register_request,
};
use specattn_proto::version::{self, PROTOCOL_VERSION};
use specattn_proto::{Fault, limits};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::channel::Dialer;

/// First and longest delay between tries.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(5);

/// Longest wait for the gateway's answer to a registration.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bounds of the heartbeat interval that a gateway may ask for.
const INTERVAL_LEAST: Duration = Duration::from_millis(20);
const INTERVAL_MOST: Duration = Duration::from_secs(60);

/// Who registers, and where.
#[derive(Debug, Clone)]
pub struct Worker {
    /// URI of the gateway.
    pub gateway: String,
    /// How it is called.
    pub dialer: Dialer,
    /// What the worker is.
    pub role: WorkerRole,
    /// URI under which others reach the worker.
    pub endpoint: String,
    /// The model it runs.
    pub model: ModelInfo,
}

/// Keeps `worker` registered until `stopped` is cancelled, reporting what `load` says at every heartbeat. Once
/// `draining` is cancelled every report says so, the first one at once.
pub async fn run(
    worker: Worker,
    load: impl Fn() -> WorkerLoad + Send + Sync,
    draining: CancellationToken,
    stopped: CancellationToken,
) {
    let report = || WorkerLoad {
        draining: draining.is_cancelled(),
        ..load()
    };
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
    let mut tries = 0_u32;
    loop {
        let mut on_registered = || {
            backoff.reset();
            tries = 0;
        };
        let fault = tokio::select! {
            fault = stay_registered(&worker, &report, &draining, &mut on_registered) => fault,
            () = stopped.cancelled() => return,
        };
        // A gateway that starts after its workers is ordinary: say so once, not at every try. So is one that ends while they
        // drain.
        if tries == 0 && !draining.is_cancelled() {
            tracing::warn!(gateway = worker.gateway, %fault, "not registered; will keep trying");
        } else {
            tracing::debug!(gateway = worker.gateway, %fault, tries, "not registered");
        }
        tries = tries.saturating_add(1);
        tokio::select! {
            () = tokio::time::sleep(backoff.delay()) => {}
            () = stopped.cancelled() => return,
        }
    }
}

/// Registers once and sends heartbeats until the stream breaks; says why it did.
async fn stay_registered(
    worker: &Worker,
    report: &(impl Fn() -> WorkerLoad + Sync),
    draining: &CancellationToken,
    on_registered: &mut (impl FnMut() + Send),
) -> Fault {
    match registered_stream(worker, report, draining, on_registered).await {
        Ok(never) => match never {},
        Err(fault) => fault,
    }
}

async fn registered_stream(
    worker: &Worker,
    report: &(impl Fn() -> WorkerLoad + Sync),
    draining: &CancellationToken,
    on_registered: &mut (impl FnMut() + Send),
) -> Result<std::convert::Infallible, Fault> {
    let link = worker.dialer.connect(&worker.gateway).await?;
    let mut client =
        RegistryServiceClient::new(link).max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
    // Two messages in flight: a gateway that reads more slowly than that gets fewer heartbeats, not a queue of old ones.
    let (sender, receiver) = mpsc::channel(2);
    let registration = Registration {
        role: worker.role.into(),
        endpoint: worker.endpoint.clone(),
        model: Some(worker.model.clone()),
        load: Some(report()),
        protocol_version: PROTOCOL_VERSION,
        build: version::build(),
    };
    let first = request(register_request::Message::Registration(registration));
    sender
        .try_send(first)
        .map_err(|_| Fault::Internal("a fresh channel has no room".to_owned()))?;

    let answered = async {
        let status = |status: tonic::Status| Fault::from_status(&status);
        let mut answers = client
            .register(ReceiverStream::new(receiver))
            .await
            .map_err(status)?
            .into_inner();
        let answer = answers.message().await.map_err(status)?;
        let answer = answer.ok_or_else(|| Fault::Unavailable("the gateway hung up".to_owned()))?;
        Ok::<_, Fault>((answers, answer))
    };
    let (mut answers, answer) = tokio::time::timeout(ANSWER_TIMEOUT, answered)
        .await
        .map_err(|_| Fault::DeadlineExceeded("the gateway does not answer".to_owned()))??;
    version::check(answer.protocol_version)?;
    let interval = Duration::from_millis(answer.heartbeat_interval_ms.into())
        .clamp(INTERVAL_LEAST, INTERVAL_MOST);
    tracing::info!(
        gateway = worker.gateway,
        worker_id = answer.worker_id,
        "registered"
    );
    on_registered();

    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told_draining = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = draining.cancelled(), if !told_draining => told_draining = true,
            answer = answers.message() => match answer {
                Ok(Some(_)) => continue,
                Ok(None) => return Err(Fault::Unavailable("the gateway hung up".to_owned())),
                Err(status) => return Err(Fault::from_status(&status)),
            },
        }
        let heartbeat = request(register_request::Message::Heartbeat(Heartbeat {
            load: Some(report()),
        }));
        match sender.try_send(heartbeat) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
            Err(mpsc::error::TrySendError::Closed(_)) => {
                return Err(Fault::Unavailable("the stream broke".to_owned()));
            }
        }
    }
}

fn request(message: register_request::Message) -> RegisterRequest {
    RegisterRequest {
        message: Some(message),
    }
}
