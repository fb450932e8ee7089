//! Client channels: how one service reaches another.
//!
//! Nagle is off, since rounds are small messages that wait for each other. HTTP/2 pings notice a peer whose host froze
//! or whose network went away; a peer that merely died is noticed by its closed socket.

use std::time::Duration;

use specattn_proto::Fault;
use tonic::transport::{Channel, Endpoint};

/// Longest wait for a TCP connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Silence after which a peer is pinged.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Wait for the ping's answer. With the interval before it, a dead peer is noticed within 2.8 seconds.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1_800);

/// How `uri` is to be connected to.
///
/// # Errors
/// [`Fault::InvalidArgument`] when it is no http URI.
pub fn endpoint(uri: &str) -> Result<Endpoint, Fault> {
    let uri = specattn_proto::validate::endpoint("endpoint", uri)?;
    Ok(Endpoint::from(uri)
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A channel that connects when first used, and again whenever the connection was lost. Needs a running Tokio runtime.
///
/// # Errors
/// [`Fault::InvalidArgument`] when `uri` is no http URI.
pub fn connect_lazy(uri: &str) -> Result<Channel, Fault> {
    Ok(endpoint(uri)?.connect_lazy())
}

/// A channel that is connected now.
///
/// # Errors
/// [`Fault::InvalidArgument`] when `uri` is no http URI; [`Fault::Unavailable`] when nobody answers there.
pub async fn connect(uri: &str) -> Result<Channel, Fault> {
    let connected = endpoint(uri)?.connect().await;
    connected.map_err(|error| {
        let mut reason: &dyn std::error::Error = &error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        Fault::Unavailable(format!("cannot connect to {uri}: {reason}"))
    })
}
