//! [`Worker`]: a loaded target model, ready to serve.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use specattn_engine::Model;
use specattn_proto::limits;
use specattn_proto::v1::verify_service_server::VerifyServiceServer;
use specattn_proto::v1::{ModelInfo, WorkerRole};
use specattn_service::guard::Access;
use specattn_service::server::Server;
use specattn_worker::host::Host;
use specattn_worker::metrics;
use specattn_worker::{EngineThread, LoadGauge, Scheduler, ServedModel, WorkerError, inbox};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::args::Config;
use crate::engine_loop::{EngineLoop, INBOX_CAPACITY};
use crate::masks::LayerMaps;
use crate::metrics::Totals;
use crate::service::Service;

/// The method that checks its callers itself.
const SPECULATE: &str = "/specattn.v1.VerifyService/Speculate";

/// A verify worker that holds its model and does not serve yet.
#[derive(Debug)]
pub struct Worker {
    config: Config,
    model: Model,
    maps: LayerMaps,
}

impl Worker {
    /// Loads the target model and its layer map. `progress` hears (bytes done, bytes in all).
    ///
    /// # Errors
    /// [`WorkerError::Hub`], [`WorkerError::Model`], [`WorkerError::LayerMap`].
    pub fn load(
        mut config: Config,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, WorkerError> {
        config.model.source = config.model.source.fetched()?;
        let model = config.model.source.load(&config.model.options, progress)?;
        let alignment = config.alignment.as_deref();
        let maps = LayerMaps::load(model.config(), alignment, config.model.source.folder())?;
        Ok(Self {
            config,
            model,
            maps,
        })
    }

    /// A worker of a model that is loaded already, with a proportional layer map.
    pub fn with_model(config: Config, model: Model) -> Self {
        Self {
            maps: LayerMaps::proportional(model.config()),
            config,
            model,
        }
    }

    /// What the target model is.
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
        let Self {
            config,
            model,
            maps,
        } = self;
        let load = LoadGauge::new(model.block_pool(), config.model.max_sessions);
        let load = Arc::new(load);
        let served = ServedModel::from(&model);
        let (commands, inbox) = inbox::channel(INBOX_CAPACITY);
        let service = Service {
            commands,
            model: served.clone(),
            maps,
            commit_interval: config.commit_interval,
            load: Arc::clone(&load),
            draining: shutdown.clone(),
            links: AtomicU64::new(0),
        };
        let totals = Totals::default();
        let mut metrics = metrics::registry(WorkerRole::Verify, &load);
        totals.register(&mut metrics);
        let scheduler = Scheduler::new(model, Arc::clone(&load), config.model.limits);
        let engine_loop = EngineLoop::new(scheduler, inbox, config.draft_timeout, totals);
        let host = Host {
            role: WorkerRole::Verify,
            server: config.server,
            gateway: config.gateway,
            model: served.info,
            load,
            metrics,
            engine: EngineThread::start(move || engine_loop.run())?,
        };
        // Open carries a session's tokens, and Welcome tells a draft of them.
        let service = VerifyServiceServer::new(service)
            .max_decoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES)
            .max_encoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES);
        // Drafts show what their session wants of them, and nothing else.
        let server = Server::new()
            .with(service, Access::Peers)
            .method(SPECULATE, Access::Everyone);
        host.serve(server, listener, shutdown).await
    }
}
