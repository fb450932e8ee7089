//! Everything that can go wrong with a worker as a whole; failures of one session are [`specattn_proto::Fault`]s.

use specattn_engine::EngineError;
use specattn_hub::HubError;
use specattn_mask::MaskError;
use specattn_service::ServiceError;

/// A worker that cannot start or go on. [`WorkerError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The model's files are not to be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The model cannot be loaded.
    #[error("cannot load the model: {0}")]
    Model(#[from] EngineError),
    /// The layer map beside the model cannot be used.
    #[error("cannot use the layer map: {0}")]
    LayerMap(#[from] MaskError),
    /// The server around the worker failed.
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The operating system gave no thread.
    #[error("cannot start the engine thread: {0}")]
    Thread(std::io::Error),
    /// The engine thread ended while the worker was serving: a defect, reported by its panic message in the log.
    #[error("the engine thread died")]
    EngineDied,
}

impl WorkerError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Hub(error) => error.label(),
            Self::Model(error) => error.label(),
            Self::LayerMap(error) => error.label(),
            Self::Service(error) => error.label(),
            Self::Thread(_) => "thread",
            Self::EngineDied => "engine_died",
        }
    }
}
