//! [`Channels`]: connections to verify workers, shared by the sessions that need them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use specattn_proto::Fault;
use tonic::transport::Channel;

/// Most endpoints remembered; beyond that all are forgotten, and connections in use live on with their sessions.
const MAX_ENDPOINTS: usize = 256;

/// Channels by endpoint. Each connects when first used and again after it was lost.
#[derive(Debug, Default)]
pub(crate) struct Channels {
    by_endpoint: Mutex<HashMap<String, Channel>>,
}

impl Channels {
    /// The channel to `endpoint`.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when it is no http URI.
    pub(crate) fn get(&self, endpoint: &str) -> Result<Channel, Fault> {
        // Nothing panics while the lock is held.
        let mut channels = self
            .by_endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(endpoint) {
            return Ok(channel.clone());
        }
        let channel = specattn_service::channel::connect_lazy(endpoint)?;
        if channels.len() == MAX_ENDPOINTS {
            channels.clear();
        }
        channels.insert(endpoint.to_owned(), channel.clone());
        Ok(channel)
    }
}
