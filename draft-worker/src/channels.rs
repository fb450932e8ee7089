//! [`Channels`]: connections to verify workers, shared by the sessions that need them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use specattn_proto::Fault;
use specattn_service::Security;
use specattn_service::channel::{Dialer, Link};

/// Most endpoints remembered; beyond that all are forgotten, and connections in use live on with their sessions.
const MAX_ENDPOINTS: usize = 256;

/// Links by endpoint. Each connects when first used and again after it was lost.
#[derive(Debug)]
pub(crate) struct Channels {
    dialer: Dialer,
    by_endpoint: Mutex<HashMap<String, Link>>,
}

impl Channels {
    /// Connections that show the worker's certificate, where it has one. Its secret is for the gateway alone: verify workers
    /// go by what a session wants of its drafts.
    pub(crate) fn new(security: &Security) -> Self {
        Self {
            dialer: Dialer::new(security.tls.clone(), None),
            by_endpoint: Mutex::default(),
        }
    }

    /// The link to `endpoint`.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when it is no http or https URI.
    pub(crate) fn get(&self, endpoint: &str) -> Result<Link, Fault> {
        // Nothing panics while the lock is held.
        let mut links = self
            .by_endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = links.get(endpoint) {
            return Ok(link.clone());
        }
        let link = self.dialer.connect_lazy(endpoint)?;
        if links.len() == MAX_ENDPOINTS {
            links.clear();
        }
        links.insert(endpoint.to_owned(), link.clone());
        Ok(link)
    }
}
