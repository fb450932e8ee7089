//! The one table between failures and gRPC statuses.
//!
//! Handlers return a [`Fault`]; `From<Fault>` builds the [`tonic::Status`], and [`Fault::from_status`] reads one back on
//! the client's side. No other file constructs a status.
//!
//! | fault | code | when |
//! | --- | --- | --- |
//! | `InvalidArgument` | INVALID_ARGUMENT | a malformed message, mask or shape |
//! | `NotFound` | NOT_FOUND | unknown session |
//! | `FailedPrecondition` | FAILED_PRECONDITION | models that do not fit together, messages out of order |
//! | `AlreadyExists` | ALREADY_EXISTS | session id in use |
//! | `Unauthenticated` | UNAUTHENTICATED | the caller shows no credentials, or none that are known |
//! | `PermissionDenied` | PERMISSION_DENIED | not allowed to the caller |
//! | `ResourceExhausted` | RESOURCE_EXHAUSTED | no KV blocks, session slots or queue room; may carry a retry hint |
//! | `Unavailable` | UNAVAILABLE | draining, no worker, a peer down or its connection lost |
//! | `DeadlineExceeded` | DEADLINE_EXCEEDED | the caller's deadline passed |
//! | `Cancelled` | CANCELLED | the caller went away |
//! | `Internal` | INTERNAL | a defect or a device failure |

use std::error::Error as _;
use std::time::Duration;

use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use crate::validate::Invalid;

/// The metadata key of the retry hint, in milliseconds; gRPC's own name for it.
const RETRY_KEY: &str = "grpc-retry-pushback-ms";

/// A failure as services exchange it. [`Fault::label`] gives a short name for metrics.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The request can never succeed as it is.
    #[error("{0}")]
    InvalidArgument(String),
    /// What the request names does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The system's state forbids the request.
    #[error("{0}")]
    FailedPrecondition(String),
    /// What the request would create exists.
    #[error("{0}")]
    AlreadyExists(String),
    /// The caller does not show who it is, or is not known.
    #[error("{0}")]
    Unauthenticated(String),
    /// The caller may not do this.
    #[error("{0}")]
    PermissionDenied(String),
    /// No room now.
    #[error("{message}")]
    ResourceExhausted {
        /// What is full.
        message: String,
        /// When to try again, where that can be told.
        retry_after: Option<Duration>,
    },
    /// A peer is gone, draining or not there yet.
    #[error("{0}")]
    Unavailable(String),
    /// The deadline passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The caller gave up.
    #[error("{0}")]
    Cancelled(String),
    /// A defect, or hardware that fails.
    #[error("{0}")]
    Internal(String),
}

impl Fault {
    /// A full resource with no retry hint.
    pub fn exhausted(message: impl Into<String>) -> Self {
        Self::ResourceExhausted {
            message: message.into(),
            retry_after: None,
        }
    }

    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::InvalidArgument(_) => "invalid_argument",
            Self::NotFound(_) => "not_found",
            Self::FailedPrecondition(_) => "failed_precondition",
            Self::AlreadyExists(_) => "already_exists",
            Self::Unauthenticated(_) => "unauthenticated",
            Self::PermissionDenied(_) => "permission_denied",
            Self::ResourceExhausted { .. } => "resource_exhausted",
            Self::Unavailable(_) => "unavailable",
            Self::DeadlineExceeded(_) => "deadline_exceeded",
            Self::Cancelled(_) => "cancelled",
            Self::Internal(_) => "internal",
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::InvalidArgument(_) => Code::InvalidArgument,
            Self::NotFound(_) => Code::NotFound,
            Self::FailedPrecondition(_) => Code::FailedPrecondition,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::Unauthenticated(_) => Code::Unauthenticated,
            Self::PermissionDenied(_) => Code::PermissionDenied,
            Self::ResourceExhausted { .. } => Code::ResourceExhausted,
            Self::Unavailable(_) => Code::Unavailable,
            Self::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Self::Cancelled(_) => Code::Cancelled,
            Self::Internal(_) => Code::Internal,
        }
    }

    /// Reads what a peer answered.
    ///
    /// A status that the local transport made up because the connection broke carries a source error; whatever code
    /// the transport chose for it, it means that the peer cannot be reached. The same holds for UNKNOWN: our services
    /// never send it.
    pub fn from_status(status: &Status) -> Self {
        let text = status.message().to_owned();
        if let Some(source) = status.source() {
            return Self::Unavailable(format!("connection lost: {text}: {source}"));
        }
        match status.code() {
            Code::InvalidArgument | Code::OutOfRange => Self::InvalidArgument(text),
            Code::NotFound => Self::NotFound(text),
            Code::FailedPrecondition | Code::Aborted => Self::FailedPrecondition(text),
            Code::AlreadyExists => Self::AlreadyExists(text),
            Code::Unauthenticated => Self::Unauthenticated(text),
            Code::PermissionDenied => Self::PermissionDenied(text),
            Code::ResourceExhausted => Self::ResourceExhausted {
                message: text,
                retry_after: retry_hint(status.metadata()),
            },
            Code::Unavailable | Code::Unknown => Self::Unavailable(text),
            Code::DeadlineExceeded => Self::DeadlineExceeded(text),
            Code::Cancelled => Self::Cancelled(text),
            Code::Ok | Code::Unimplemented | Code::Internal | Code::DataLoss => {
                Self::Internal(format!("peer answered {:?}: {text}", status.code()))
            }
        }
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Self {
        let mut status = Status::new(fault.code(), fault.to_string());
        if let Fault::ResourceExhausted {
            retry_after: Some(after),
            ..
        } = fault
        {
            let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
            status
                .metadata_mut()
                .insert(RETRY_KEY, MetadataValue::from(millis));
        }
        status
    }
}

impl From<Invalid> for Fault {
    fn from(invalid: Invalid) -> Self {
        Self::InvalidArgument(invalid.to_string())
    }
}

impl From<Invalid> for Status {
    fn from(invalid: Invalid) -> Self {
        Fault::from(invalid).into()
    }
}

fn retry_hint(metadata: &MetadataMap) -> Option<Duration> {
    let millis = metadata.get(RETRY_KEY)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_survives_the_wire() {
        let text = || "why".to_owned();
        let faults = [
            Fault::InvalidArgument(text()),
            Fault::NotFound(text()),
            Fault::FailedPrecondition(text()),
            Fault::AlreadyExists(text()),
            Fault::Unauthenticated(text()),
            Fault::PermissionDenied(text()),
            Fault::exhausted("why"),
            Fault::ResourceExhausted {
                message: text(),
                retry_after: Some(Duration::from_millis(250)),
            },
            Fault::Unavailable(text()),
            Fault::DeadlineExceeded(text()),
            Fault::Cancelled(text()),
        ];
        for fault in faults {
            assert_eq!(Fault::from_status(&Status::from(fault.clone())), fault);
        }
        let internal = Fault::from_status(&Status::from(Fault::Internal(text())));
        assert_eq!(internal.label(), "internal");
    }

    #[test]
    fn a_broken_connection_reads_as_unavailable() {
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert_eq!(Fault::from_status(&broken).label(), "unavailable");
    }
}
