//! [`Worker`]: a loaded draft model, ready to serve.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use specattn_engine::Model;
use specattn_proto::limits;
use specattn_proto::v1::draft_service_server::DraftServiceServer;
use specattn_proto::v1::{ModelInfo, WorkerRole};
use specattn_service::guard::Access;
use specattn_service::server::Server;
use specattn_worker::host::Host;
use specattn_worker::metrics;
use specattn_worker::{EngineThread, LoadGauge, Scheduler, ServedModel, WorkerError, inbox};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::args::Config;
use crate::channels::Channels;
use crate::engine_loop::{EngineLoop, INBOX_CAPACITY};
use crate::metrics::Totals;
use crate::service::Service;

/// A draft worker that holds its model and does not serve yet.
#[derive(Debug)]
pub struct Worker {
    config: Config,
    model: Model,
}

impl Worker {
    /// Loads the draft model. `progress` hears (bytes done, bytes in all).
    ///
    /// # Errors
    /// [`WorkerError::Hub`], [`WorkerError::Model`].
    pub fn load(
        mut config: Config,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, WorkerError> {
        config.model.source = config.model.source.fetched()?;
        let model = config.model.source.load(&config.model.options, progress)?;
        Ok(Self { config, model })
    }

    /// A worker of a model that is loaded already.
    pub fn with_model(config: Config, model: Model) -> Self {
        Self { config, model }
    }

    /// What the draft model is.
    pub fn model_info(&self) -> ModelInfo {
        specattn_worker::model_info(&self.model)
    }

    /// Serves on `listener` until `shutdown` is cancelled and running sessions have ended or the grace period has.
    ///
    /// # Errors
    /// [`WorkerError`] when the worker cannot go on.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: CancellationToken,
    ) -> Result<(), WorkerError> {
        let Self { config, model } = self;
        let load = LoadGauge::new(model.block_pool(), config.model.max_sessions);
        let load = Arc::new(load);
        let served = ServedModel::from(&model);
        let (commands, inbox) = inbox::channel(INBOX_CAPACITY);
        let totals = Totals::default();
        let mut metrics = metrics::registry(WorkerRole::Draft, &load);
        totals.register(&mut metrics);
        let service = Service {
            totals,
            commands,
            model: served.clone(),
            drafting: config.drafting,
            channels: Channels::new(&config.server.security),
            load: Arc::clone(&load),
            draining: shutdown.clone(),
            sessions: AtomicU64::new(0),
        };
        let scheduler = Scheduler::new(model, Arc::clone(&load), config.model.limits);
        let engine_loop = EngineLoop::new(scheduler, inbox);
        let host = Host {
            role: WorkerRole::Draft,
            server: config.server,
            gateway: config.gateway,
            model: served.info,
            load,
            metrics,
            engine: EngineThread::start(move || engine_loop.run())?,
        };
        // Attach carries a session's tokens.
        let service = DraftServiceServer::new(service)
            .max_decoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
        let server = Server::new().with(service, Access::Peers);
        host.serve(server, listener, shutdown).await
    }
}
