//! What every SpecAttn process shares: argument groups, telemetry, the gRPC server around a service, client channels,
//! shutdown signals and the loop that registers a worker with the gateway.
//!
//! A binary is then short: parse its arguments ([`args::parse`]), start the log ([`telemetry::init`]), bind a listener,
//! and serve until [`shutdown::on_signal`] fires. Nothing here knows models or sessions.

pub mod args;
mod backoff;
pub mod channel;
mod connection;
mod error;
mod metrics;
pub mod registration;
pub mod server;
pub mod shutdown;
pub mod telemetry;

pub use backoff::Backoff;
pub use error::ServiceError;
