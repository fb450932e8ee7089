//! `Guard`: who may call what.
//!
//! Every route has an [`Access`], and a service that says nothing of its own is for peers only. A caller is recognised by
//! what it shows: a certificate of the cluster's authority on its connection, or a secret or key in `authorization`.
//! Handlers find in the request's extensions who it was: [`Member`], and whatever [`Clients`] put there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Extensions, HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use specattn_proto::Fault;
use tonic::Status;

use crate::connection::Peer;
use crate::secret::{MOST_CHARACTERS, Secrets};

/// Least time between two log lines about refused callers.
const WARN_INTERVAL: Duration = Duration::from_secs(1);

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Anybody: health, and what checks for itself.
    Everyone,
    /// Clients of the service.
    Clients,
    /// Other parts of the cluster.
    Peers,
    /// Clients that may look after the cluster.
    Operators,
    /// Parts of the cluster, and clients that may look after it.
    Insiders,
}

/// How other parts of the cluster are recognised.
#[derive(Debug, Clone, Default)]
pub enum Peers {
    /// Whoever calls is one: for loopback addresses, and where a person said so.
    #[default]
    Anyone,
    /// By a certificate of the cluster's authority.
    Certified,
    /// By one of these secrets.
    Secrets(Vec<Secrets>),
    /// Not at all.
    Nobody,
}

/// A recognised part of the cluster, in a request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member(u64);

impl Member {
    /// Whether it showed the secret of this index, or none was asked for.
    pub fn holds(self, index: usize) -> bool {
        index < 64 && self.0 & (1 << index) != 0
    }
}

/// What a caller shows.
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a> {
    /// The token after `Bearer` in `authorization`.
    pub bearer: Option<&'a str>,
    /// Whether its certificate is one of the cluster's authority.
    pub certified: bool,
}

/// The clients that a service knows.
pub trait Clients: Send + Sync + 'static {
    /// Recognises a client and notes it in the request's `extensions`. Says whether it may look after the cluster.
    ///
    /// # Errors
    /// [`Fault::Unauthenticated`] for one that is not known.
    fn recognise(&self, shown: Shown<'_>, extensions: &mut Extensions) -> Result<bool, Fault>;

    /// The answer to a plain HTTP request that is refused.
    fn refusal(&self, fault: Fault) -> Response;
}

/// Lets callers in or not.
pub(crate) struct Guard {
    pub(crate) peers: Peers,
    /// `None`: the service has no clients, only peers.
    pub(crate) clients: Option<Arc<dyn Clients>>,
    pub(crate) complaints: Complaints,
}

impl Guard {
    /// Lets a caller in, or says why not.
    fn check(&self, access: Access, request: &mut Request) -> Result<(), Fault> {
        let certified = match request.extensions().get::<Peer>().cloned() {
            Some(peer) => {
                // Where handlers look for the caller's address.
                request.extensions_mut().insert(peer.tcp);
                peer.certified
            }
            None => false,
        };
        let bearer = bearer(request.headers()).map(str::to_owned);
        let shown = Shown {
            bearer: bearer.as_deref(),
            certified,
        };
        let extensions = request.extensions_mut();
        match access {
            Access::Everyone => Ok(()),
            Access::Peers => self.peer(shown, extensions),
            Access::Clients => self.client(shown, extensions).map(drop),
            Access::Insiders if self.peer(shown, extensions).is_ok() => Ok(()),
            Access::Operators | Access::Insiders => {
                if self.client(shown, extensions)? {
                    return Ok(());
                }
                Err(Fault::PermissionDenied(
                    "this is for operators: the API key is not one's".to_owned(),
                ))
            }
        }
    }

    fn peer(&self, shown: Shown<'_>, extensions: &mut Extensions) -> Result<(), Fault> {
        let member = match &self.peers {
            Peers::Anyone => Member(u64::MAX),
            Peers::Certified if shown.certified => Member(u64::MAX),
            Peers::Certified => {
                return Err(Fault::Unauthenticated(
                    "a certificate of the cluster is wanted".to_owned(),
                ));
            }
            Peers::Secrets(secrets) => {
                let held = secrets
                    .iter()
                    .enumerate()
                    .fold(0, |held, (index, secrets)| {
                        let accepted = shown.bearer.is_some_and(|bearer| secrets.accept(bearer));
                        held | u64::from(accepted) << index.min(63)
                    });
                if held == 0 {
                    return Err(Fault::Unauthenticated(
                        "the cluster's secret is wanted".to_owned(),
                    ));
                }
                Member(held)
            }
            Peers::Nobody => {
                return Err(Fault::PermissionDenied(
                    "no other service may call here".to_owned(),
                ));
            }
        };
        extensions.insert(member);
        Ok(())
    }

    fn client(&self, shown: Shown<'_>, extensions: &mut Extensions) -> Result<bool, Fault> {
        match &self.clients {
            Some(clients) => clients.recognise(shown, extensions),
            None => self.peer(shown, extensions).map(|()| true),
        }
    }

    fn refuse(&self, fault: Fault, is_grpc: bool) -> Response {
        if is_grpc {
            return Status::from(fault).into_http::<Body>();
        }
        match &self.clients {
            Some(clients) => clients.refusal(fault),
            None => (axum::http::StatusCode::FORBIDDEN, fault.to_string()).into_response(),
        }
    }
}

/// The access of gRPC methods.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    services: BTreeMap<&'static str, Access>,
    /// Exceptions, by whole path.
    methods: BTreeMap<&'static str, Access>,
}

impl Rules {
    pub(crate) fn service(&mut self, name: &'static str, access: Access) {
        self.services.insert(name, access);
    }

    pub(crate) fn method(&mut self, path: &'static str, access: Access) {
        self.methods.insert(path, access);
    }

    /// Paths of no service are for everyone: there is nothing behind them.
    fn access(&self, path: &str) -> Access {
        let service = path.strip_prefix('/').and_then(|rest| rest.split_once('/'));
        let of_service = service.and_then(|(name, _)| self.services.get(name));
        let access = self.methods.get(path).or(of_service);
        access.copied().unwrap_or(Access::Everyone)
    }
}

/// How the access of a route is found.
#[derive(Debug, Clone)]
pub(crate) enum Door {
    For(Access),
    ByPath(Arc<Rules>),
}

/// The guard's place before the routes behind a door.
pub(crate) async fn stand(
    State((guard, door)): State<(Arc<Guard>, Door)>,
    mut request: Request,
    next: Next,
) -> Response {
    let access = match &door {
        Door::For(access) => *access,
        Door::ByPath(rules) => rules.access(request.uri().path()),
    };
    match guard.check(access, &mut request) {
        Ok(()) => next.run(request).await,
        Err(fault) => {
            guard.complaints.about(&request, &fault);
            let is_grpc = request
                .headers()
                .get(header::CONTENT_TYPE)
                .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
            guard.refuse(fault, is_grpc)
        }
    }
}

/// The token after `Bearer`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = text.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && token.len() <= MOST_CHARACTERS).then_some(token)
}

/// Log lines about refused callers: one a second at most, with the number of those left out.
pub(crate) struct Complaints {
    since: Instant,
    /// Milliseconds after `since` until which nothing more is said.
    quiet_until: AtomicU64,
    left_out: AtomicU64,
}

impl Complaints {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            quiet_until: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }

    fn about(&self, request: &Request, fault: &Fault) {
        let elapsed = |after: Duration| {
            u64::try_from((self.since.elapsed() + after).as_millis()).unwrap_or(u64::MAX)
        };
        if elapsed(Duration::ZERO) < self.quiet_until.load(Ordering::Relaxed) {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.quiet_until
            .store(elapsed(WARN_INTERVAL), Ordering::Relaxed);
        let peer = request.extensions().get::<Peer>();
        let address = peer.and_then(|peer| peer.tcp.remote_addr());
        tracing::warn!(
            address = address.map(|address| address.to_string()),
            path = request.uri().path(),
            code = fault.label(),
            %fault,
            others = self.left_out.swap(0, Ordering::Relaxed),
            "caller refused"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A short request, 16 tokens of the fastest pair, takes 8 ms: a hundredth of that is 80 µs.
    #[test]
    fn a_look_at_a_caller_costs_far_less_than_a_hundredth_of_a_request() {
        let secrets = ["one", "two"].map(|secret| Secrets::of(&secret.repeat(16)).unwrap());
        let guard = Guard {
            peers: Peers::Secrets(secrets.to_vec()),
            clients: None,
            complaints: Complaints::new(),
        };
        let batch = || {
            let start = Instant::now();
            for _ in 0..100 {
                let mut request = Request::new(Body::empty());
                let token = format!("Bearer {}", "two".repeat(16));
                let value = token.parse().unwrap();
                request.headers_mut().insert(header::AUTHORIZATION, value);
                guard.check(Access::Peers, &mut request).unwrap();
            }
            start.elapsed() / 100
        };
        // The fastest of many: others use the machine too.
        let each = (0..100).map(|_| batch()).min().unwrap_or_default();
        eprintln!("{} ns a request", each.as_nanos());
        assert!(each < Duration::from_micros(20), "{each:?} a request");
    }
}
