//! What every SpecAttn process shares: argument groups, telemetry, the gRPC server around a service and the guard before it,
//! client channels, certificates and secrets, shutdown signals and the loop that registers a worker with the gateway.
//!
//! A binary is then short: parse its arguments ([`args::parse`]), start log and traces ([`telemetry::init`]), bind a listener,
//! and serve until [`shutdown::on_signal`] fires. Nothing here knows models or sessions.

pub mod args;
mod backoff;
pub mod channel;
mod collector;
mod connection;
mod error;
pub mod guard;
mod metrics;
pub mod registration;
mod secret;
pub mod security;
pub mod server;
pub mod shutdown;
pub mod telemetry;
mod tls;
pub mod trace;
mod watched;

pub use backoff::Backoff;
pub use error::ServiceError;
pub use secret::Secrets;
pub use security::Security;
pub use tls::Tls;
pub use watched::Watched;
