//! [`Cluster`]: a gateway and workers that registered with it.

use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_proto::v1::{StatusRequest, StatusResponse, WorkerRole};
use tonic::transport::Channel;

use crate::process::{self, DRAFT, GATEWAY, Process, VERIFY};
use crate::until;

/// A gateway for the bundled target at `address`.
pub async fn gateway_at(address: &str, arguments: &[&str]) -> Process {
    let tokenizer = process::target();
    let tokenizer = tokenizer.to_str().expect("paths of tests are UTF-8");
    let mut line = vec!["--tokenizer", tokenizer, "--heartbeat-interval-ms", "200"];
    line.extend(arguments);
    Process::start_at(GATEWAY, address, &line).await
}

/// A gateway, one verify worker and any number of draft workers, with the bundled pair.
#[derive(Debug)]
pub struct Cluster {
    /// The gateway.
    pub gateway: Process,
    /// The verify worker.
    pub verify: Process,
    /// The draft workers.
    pub drafts: Vec<Process>,
}

impl Cluster {
    /// Starts everything and waits until the gateway knows all workers.
    pub async fn start(drafts: usize) -> Self {
        Self::start_with(drafts, &[]).await
    }

    /// The same with more arguments for the gateway.
    pub async fn start_with(drafts: usize, arguments: &[&str]) -> Self {
        let gateway = gateway_at(&process::free_address(), arguments).await;
        let verify = Process::worker(VERIFY, &["--gateway", gateway.uri()]).await;
        let mut cluster = Self::of(gateway, verify, Vec::new()).await;
        for _ in 0..drafts {
            cluster.add_draft().await;
        }
        cluster
    }

    /// Services that were started otherwise, once the gateway knows the workers.
    pub async fn of(gateway: Process, verify: Process, drafts: Vec<Process>) -> Self {
        let cluster = Self {
            gateway,
            verify,
            drafts,
        };
        cluster.knows(WorkerRole::Verify, 1).await;
        cluster.knows(WorkerRole::Draft, cluster.drafts.len()).await;
        cluster
    }

    /// Starts one more draft worker and waits until the gateway knows it.
    pub async fn add_draft(&mut self) {
        let draft = Process::worker(DRAFT, &["--gateway", self.gateway.uri()]).await;
        // By name: one that was killed may still be on its way out.
        until("the draft to register", || async {
            let mut workers = self.status().await.workers.into_iter();
            workers.any(|worker| worker.endpoint == draft.uri())
        })
        .await;
        self.drafts.push(draft);
    }

    /// A connection to the gateway.
    pub async fn channel(&self) -> Channel {
        self.gateway.channel().await
    }

    /// What the gateway says of its workers and sessions.
    pub async fn status(&self) -> StatusResponse {
        let mut client = RegistryServiceClient::new(self.channel().await);
        client.status(StatusRequest {}).await.unwrap().into_inner()
    }

    async fn count(&self, role: WorkerRole) -> usize {
        let workers = self.status().await.workers;
        workers
            .iter()
            .filter(|worker| worker.role() == role)
            .count()
    }

    /// Waits until the gateway knows `count` workers of `role`.
    pub async fn knows(&self, role: WorkerRole, count: usize) {
        until("workers to register", || async {
            self.count(role).await == count
        })
        .await;
    }

    /// Waits until no session and no KV block is left anywhere.
    pub async fn is_idle(&self) {
        until("sessions to end", || async {
            self.status().await.sessions.is_empty()
        })
        .await;
        self.verify.is_idle().await;
        for draft in &self.drafts {
            draft.is_idle().await;
        }
    }
}
