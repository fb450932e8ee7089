//! Everything that ends a command early, and the exit codes.

use std::path::PathBuf;

use specattn_proto::Fault;
use specattn_service::ServiceError;

/// Exit code of a command that failed.
pub const EXIT_FAILURE: u8 = 1;
/// Exit code for a command line that makes no sense (BSD's EX_USAGE).
pub const EXIT_USAGE: u8 = 64;
/// Exit code after Ctrl-C, as shells report it.
pub const EXIT_INTERRUPTED: u8 = 130;

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The command line or the prompt makes no sense.
    #[error("{0}")]
    Usage(String),
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file, or `-` for standard input.
        path: PathBuf,
        /// The operating system's word.
        source: std::io::Error,
    },
    /// Standard output could not be written.
    #[error("cannot write the output: {0}")]
    Write(std::io::Error),
    /// A service answered with an error, or did not answer.
    #[error("{label}: {fault}", label = fault.label())]
    Service {
        /// What it said.
        fault: Fault,
    },
    /// A service broke a promise of the protocol.
    #[error("the gateway broke the protocol: {0}")]
    Protocol(&'static str),
    /// A service of this process could not be started, or failed.
    #[error("cannot run the {service}: {reason}")]
    Start {
        /// Which one.
        service: &'static str,
        /// Why.
        reason: String,
    },
    /// A model's files are not to be had.
    #[error(transparent)]
    Hub(#[from] specattn_hub::HubError),
    /// Calibration or evaluation failed.
    #[error(transparent)]
    Quality(#[from] specattn_quality::QualityError),
    /// Arguments, sockets, signals or logs.
    #[error(transparent)]
    Process(#[from] ServiceError),
    /// Ctrl-C, before there was anything to report.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    /// A short stable name.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Read { .. } => "read",
            Self::Write(_) => "write",
            Self::Service { fault } => fault.label(),
            Self::Protocol(_) => "protocol",
            Self::Start { .. } => "start",
            Self::Hub(error) => error.label(),
            Self::Quality(error) => error.label(),
            Self::Process(error) => error.label(),
            Self::Interrupted => "interrupted",
        }
    }

    /// What the process should exit with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_)
            | Self::Process(ServiceError::Argument { .. } | ServiceError::Telemetry(_)) => {
                EXIT_USAGE
            }
            Self::Interrupted => EXIT_INTERRUPTED,
            _ => EXIT_FAILURE,
        }
    }
}

impl From<Fault> for CliError {
    fn from(fault: Fault) -> Self {
        Self::Service { fault }
    }
}

impl From<tonic::Status> for CliError {
    fn from(status: tonic::Status) -> Self {
        Fault::from_status(&status).into()
    }
}
