//! [`Channels`]: connections to verify workers, shared by the sessions that need them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use specattn_proto::Fault;
use specattn_service::Security;
use specattn_service::channel::{self, Dialer, Link};

use crate::round_trips::RoundTrips;

/// Most endpoints remembered; beyond that all are forgotten, and connections in use live on with their sessions.
const MAX_ENDPOINTS: usize = 256;

/// Routes by endpoint.
#[derive(Debug)]
pub(crate) struct Channels {
    dialer: Dialer,
    by_endpoint: Mutex<HashMap<String, Route>>,
}

/// The way to one verify worker.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    /// Connects when first used and again after it was lost.
    pub(crate) link: Link,
    trips: Arc<Mutex<RoundTrips>>,
}

impl Route {
    /// The shortest recent round trip, after one was measured now; none when nobody answered.
    pub(crate) async fn round_trip(&self) -> Option<Duration> {
        if self.trips().shortest().is_none() {
            // What is asked first waits for the connection, too.
            channel::ping(self.link.clone()).await.ok()?;
        }
        let measured = channel::ping(self.link.clone()).await.ok()?;
        let mut trips = self.trips();
        trips.note(measured);
        trips.shortest()
    }

    fn trips(&self) -> MutexGuard<'_, RoundTrips> {
        // Nothing panics while the lock is held.
        self.trips.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

    /// The route to `endpoint`.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when it is no http or https URI.
    pub(crate) fn get(&self, endpoint: &str) -> Result<Route, Fault> {
        // Nothing panics while the lock is held.
        let mut routes = self
            .by_endpoint
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(route) = routes.get(endpoint) {
            return Ok(route.clone());
        }
        let route = Route {
            link: self.dialer.connect_lazy(endpoint)?,
            trips: Arc::default(),
        };
        if routes.len() == MAX_ENDPOINTS {
            routes.clear();
        }
        routes.insert(endpoint.to_owned(), route.clone());
        Ok(route)
    }
}
