//! Workers that do not register themselves: the gateway asks each endpoint on its lists how it is, at the pace of
//! heartbeats, and treats the answers as heartbeats.
//!
//! An entry `dns://NAME:PORT` stands for every address of a name, looked up again and again: Kubernetes' headless services
//! list the pods that are ready under one name. `dns+https://NAME:PORT` is the same by TLS; the workers' certificates must
//! then be valid for their addresses, or for the name given by `--tls-server-name`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{
    DraftStatusRequest, ModelInfo, VerifyStatusRequest, WorkerLoad, WorkerRole,
};
use specattn_proto::{Fault, limits, version};
use specattn_service::channel::Link;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::Gateway;
use crate::registry::WorkerId;

/// Unanswered questions in a row after which a worker is gone.
const MISSED_ANSWERS: u32 = 3;

/// Longest wait for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two look-ups of a name.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(2);

/// Most addresses of a name that are watched.
const MAX_ADDRESSES: usize = 1_024;

/// What a list entry says that stands for all addresses of a name: their scheme; host and port.
pub(crate) fn name(entry: &str) -> Option<(&'static str, &str)> {
    let plain = entry.strip_prefix("dns://").map(|name| ("http", name));
    let tls = || {
        entry
            .strip_prefix("dns+https://")
            .map(|name| ("https", name))
    };
    plain.or_else(tls)
}

/// Starts a task per listed endpoint; they end when the drain begins.
pub(crate) fn watch(gateway: &Arc<Gateway>) {
    let lists = [
        (WorkerRole::Verify, &gateway.config.verify_endpoints),
        (WorkerRole::Draft, &gateway.config.draft_endpoints),
    ];
    for (role, endpoints) in lists {
        for endpoint in endpoints {
            match name(endpoint) {
                Some((scheme, name)) => {
                    let names = NamedWorkers {
                        gateway: Arc::clone(gateway),
                        role,
                        scheme,
                        name: name.to_owned(),
                    };
                    let shutdown = gateway.shutdown.clone();
                    gateway.tasks.spawn(async move {
                        shutdown.run_until_cancelled_owned(names.watch()).await;
                    });
                }
                None => KnownWorker::start(gateway, role, endpoint.clone(), &gateway.shutdown),
            }
        }
    }
}

/// All workers behind a name.
struct NamedWorkers {
    gateway: Arc<Gateway>,
    role: WorkerRole,
    /// How the workers are called: http or https.
    scheme: &'static str,
    /// Host and port.
    name: String,
}

impl NamedWorkers {
    fn uri(&self, address: SocketAddr) -> String {
        format!("{}://{address}", self.scheme)
    }

    /// Looks the name up again and again. An address that is not listed any more is watched no longer once its worker is
    /// gone: a name server that fails takes no worker away.
    async fn watch(&self) -> std::convert::Infallible {
        let mut watched: HashMap<SocketAddr, CancellationToken> = HashMap::new();
        let mut ticks = tokio::time::interval(LOOKUP_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let found: Vec<SocketAddr> = match tokio::net::lookup_host(&self.name).await {
                Ok(found) => found.take(MAX_ADDRESSES).collect(),
                Err(error) => {
                    tracing::debug!(name = self.name, %error, "the name has no address");
                    continue;
                }
            };
            watched.retain(|address, stop| {
                let stays = found.contains(address)
                    || self.gateway.registry.knows(self.role, &self.uri(*address));
                if !stays {
                    tracing::info!(name = self.name, %address, "address is not listed any more");
                    stop.cancel();
                }
                stays
            });
            for address in found {
                if watched.contains_key(&address) || watched.len() >= MAX_ADDRESSES {
                    continue;
                }
                let stop = self.gateway.shutdown.child_token();
                KnownWorker::start(&self.gateway, self.role, self.uri(address), &stop);
                watched.insert(address, stop);
            }
        }
    }
}

struct KnownWorker {
    gateway: Arc<Gateway>,
    role: WorkerRole,
    endpoint: String,
}

impl KnownWorker {
    /// Watches an endpoint in a task of its own until `stop` is cancelled.
    fn start(gateway: &Arc<Gateway>, role: WorkerRole, endpoint: String, stop: &CancellationToken) {
        let known = Self {
            gateway: Arc::clone(gateway),
            role,
            endpoint,
        };
        let stop = stop.clone();
        gateway.tasks.spawn(async move {
            if let Some(fault) = stop.run_until_cancelled(known.watch()).await {
                tracing::error!(endpoint = known.endpoint, %fault, "cannot watch this worker");
            }
        });
    }

    /// Asks again and again; ends only when the endpoint cannot be one.
    async fn watch(&self) -> Fault {
        let link = match self.gateway.registry.link(self.role, &self.endpoint) {
            Ok(link) => link,
            Err(fault) => return fault,
        };
        let mut member: Option<WorkerId> = None;
        let mut missed = 0;
        let mut ticks = tokio::time::interval(self.gateway.config.heartbeat_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let asked = tokio::time::timeout(ANSWER_TIMEOUT, ask(self.role, link.clone()));
            let answer = match asked.await {
                Ok(answer) => answer,
                Err(_) => Err(Fault::DeadlineExceeded("no answer".to_owned())),
            };
            let taken = answer.and_then(|(model, load)| self.take(&mut member, model, load));
            match taken {
                Ok(()) => missed = 0,
                Err(fault) => {
                    missed += 1;
                    tracing::debug!(endpoint = self.endpoint, missed, %fault, "no word of a listed worker");
                    if missed == MISSED_ANSWERS {
                        tracing::warn!(endpoint = self.endpoint, %fault, "listed worker is not there");
                        if let Some(id) = member.take() {
                            self.gateway.registry.remove(id, "does not answer");
                        }
                    }
                }
            }
        }
    }

    /// Treats an answer as a heartbeat, or as a registration when the worker is not known (any more).
    fn take(
        &self,
        member: &mut Option<WorkerId>,
        model: Option<ModelInfo>,
        load: WorkerLoad,
    ) -> Result<(), Fault> {
        let registry = &self.gateway.registry;
        if member.is_some_and(|id| registry.report(id, load)) {
            return Ok(());
        }
        *member = None;
        // It may have registered by itself as well: its own word is fresher.
        if !registry.knows(self.role, &self.endpoint) {
            *member = Some(registry.add(self.role, self.endpoint.clone(), model, load)?);
        }
        Ok(())
    }
}

async fn ask(role: WorkerRole, link: Link) -> Result<(Option<ModelInfo>, WorkerLoad), Fault> {
    let status = |status: tonic::Status| Fault::from_status(&status);
    let most = limits::MAX_SMALL_MESSAGE_BYTES;
    let (model, load, version) = if role == WorkerRole::Draft {
        let mut client = DraftServiceClient::new(link).max_decoding_message_size(most);
        let answer = client.draft_status(DraftStatusRequest {}).await;
        let answer = answer.map_err(status)?.into_inner();
        (answer.model, answer.load, answer.protocol_version)
    } else {
        let mut client = VerifyServiceClient::new(link).max_decoding_message_size(most);
        let answer = client.verify_status(VerifyStatusRequest {}).await;
        let answer = answer.map_err(status)?.into_inner();
        (answer.model, answer.load, answer.protocol_version)
    };
    version::check(version)?;
    Ok((model, load.unwrap_or_default()))
}
