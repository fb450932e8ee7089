//! The harness of the end-to-end tests: the project's binaries as processes of their own, and clients to talk to them.
//!
//! [`Process`] runs one service and kills it when dropped; [`Cluster`] runs a gateway with workers that registered;
//! [`Session`] plays the gateway itself against one verify worker. Every wait has a limit, so that a test that hangs
//! fails and says where.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod binaries;
pub mod certificates;
pub mod chaos;
pub mod client;
pub mod cluster;
pub mod collector;
pub mod count;
pub mod hostile;
pub mod http;
pub mod https;
pub mod metrics;
pub mod network;
pub mod process;
pub mod proxy;
pub mod python;
pub mod raw;
pub mod repeater;
pub mod replay;
pub mod session;
pub mod stranger;
pub mod texts;
pub mod trap;

pub use client::{Completion, Request};
pub use cluster::Cluster;
pub use process::{DRAFT, Process, VERIFY};
pub use session::Session;

use std::future::Future;
use std::time::Duration;

use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::{Body as HttpBody, Bytes, StdError};

/// A connection, whatever is shown on it.
pub trait Way:
    GrpcService<
        Body,
        Error: Into<StdError>,
        ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
    >
{
}

impl<T> Way for T where
    T: GrpcService<
            Body,
            Error: Into<StdError>,
            ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
        >
{
}

/// Longest any single wait may take; generous, since an unoptimised build may share two cores with a compiler.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits for `future`, but not for ever.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    let output = within(PATIENCE, Box::pin(future)).await;
    output.unwrap_or_else(|| panic!("{what} takes more than {PATIENCE:?}"))
}

/// What `future` comes to within `patience`, counted in whole seconds in which this process ran: a machine that stood still
/// for a while is not taken for a service that does.
pub async fn within<F: Future>(patience: Duration, future: F) -> Option<F::Output> {
    let mut future = Box::pin(future);
    for _ in 0..patience.as_secs() {
        if let Ok(output) = tokio::time::timeout(Duration::from_secs(1), &mut future).await {
            return Some(output);
        }
    }
    None
}

/// Asks `condition` until it holds.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    soon(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}
