//! Everything that can go wrong around a service.

use std::net::SocketAddr;

/// A failure to start or run a service. [`ServiceError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The listening address cannot be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// An argument is out of range.
    #[error("{argument} {reason}")]
    Argument {
        /// The flag.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that the process was told to read cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The log cannot be set up.
    #[error("cannot set up the log: {0}")]
    Telemetry(String),
    /// The operating system refused a signal handler or a socket query.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// The gRPC server failed.
    #[error("gRPC server: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The descriptor set for reflection is broken.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl ServiceError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Listen { .. } => "listen",
            Self::Argument { .. } => "argument",
            Self::File { .. } => "file",
            Self::Telemetry(_) => "telemetry",
            Self::System { .. } => "system",
            Self::Server(_) => "server",
            Self::Reflection(_) => "reflection",
        }
    }
}
