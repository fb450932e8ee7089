//! The frame in which a worker serves: its gRPC server, its registration, its engine thread and its end.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use specattn_proto::v1::{ModelInfo, WorkerRole};
use specattn_service::registration;
use specattn_service::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::engine_thread::EngineThread;
use crate::error::WorkerError;
use crate::load::LoadGauge;

/// What the engine thread gets to end once nothing can reach it any more.
const ENGINE_END: Duration = Duration::from_secs(5);

/// A worker about to serve.
#[derive(Debug)]
pub struct Host {
    /// Which kind of worker.
    pub role: WorkerRole,
    /// Its server.
    pub server: ServerConfig,
    /// The gateway to register with, if any.
    pub gateway: Option<String>,
    /// Its model.
    pub model: ModelInfo,
    /// Its load.
    pub load: Arc<LoadGauge>,
    /// What it shows at `/metrics`.
    pub metrics: Registry,
    /// Its engine, whose inbox only `router` and what that spawns may reach.
    pub engine: EngineThread,
}

impl Host {
    /// Serves `router` on `listener` until `shutdown` is cancelled and the drain is over.
    ///
    /// # Errors
    /// [`WorkerError::Service`] when the server fails, [`WorkerError::EngineDied`] when the engine thread does.
    pub async fn serve(
        self,
        router: Server,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<(), WorkerError> {
        let address = listener.local_addr().ok();
        // Ends the registration however this function ends.
        let stopped = CancellationToken::new();
        let _stop = stopped.clone().drop_guard();
        if let Some(gateway) = self.gateway {
            let worker = registration::Worker {
                gateway,
                dialer: self.server.security.dialer(),
                role: self.role,
                endpoint: self.server.endpoint(&listener)?,
                model: self.model,
            };
            let load = Arc::clone(&self.load);
            tokio::spawn(registration::run(
                worker,
                move || load.report(false),
                shutdown.clone(),
                stopped,
            ));
        }
        if let Some(address) = address {
            tracing::info!(%address, "serving");
        }
        let router = router.with_metrics(self.metrics);
        tokio::select! {
            served = router.serve(listener, &self.server, shutdown) => served?,
            () = self.engine.ended() => return Err(WorkerError::EngineDied),
        }
        if tokio::time::timeout(ENGINE_END, self.engine.ended())
            .await
            .is_err()
        {
            tracing::warn!("the engine thread is still busy");
        }
        tracing::info!("stopped");
        Ok(())
    }
}
