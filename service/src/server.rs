//! The gRPC server around a service: health, reflection, limits, the guard and the drain.
//!
//! Drain: when the shutdown token is cancelled, health turns to NOT_SERVING, the listening socket closes and clients are
//! told to open no new streams. Running streams get the grace period; then every connection is cut. A handler whose
//! stream would never end by itself must watch the same token.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::middleware::from_fn_with_state;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::connection;
use crate::error::ServiceError;
use crate::guard::{Access, Clients, Complaints, Door, Guard, Peers, Rules, stand};
use crate::metrics;
use crate::security::Security;

/// Most streams that one connection may have open.
const MAX_STREAMS_PER_CONNECTION: u32 = 1_024;

/// Bytes a peer may send on one stream, and on one connection, before the server has read them.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Largest header list accepted.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Silence after which a caller is pinged, and the wait for its answer. More patient than our own channels: a caller on
/// a poor network keeps its streams, and nobody waits for one that died.
const PING_AFTER: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// How a server is reached and how it stops.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// URI under which others reach it; `None` derives it from the listening address.
    pub advertise: Option<String>,
    /// What running streams get to end after shutdown began.
    pub drain_timeout: Duration,
    /// What the process shows, and whom it trusts.
    pub security: Security,
    /// How other parts of the cluster are recognised.
    pub peers: Peers,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            advertise: None,
            drain_timeout: Duration::from_secs(10),
            security: Security::default(),
            peers: Peers::default(),
        }
    }
}

impl ServerConfig {
    /// The URI to register under, for a server on `listener`.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] when the listener takes every address and none was advertised;
    /// [`ServiceError::System`] when the socket does not know its address.
    pub fn endpoint(&self, listener: &TcpListener) -> Result<String, ServiceError> {
        if let Some(uri) = &self.advertise {
            return Ok(uri.clone());
        }
        let address = listener
            .local_addr()
            .map_err(|source| ServiceError::System {
                what: "asking the socket for its address",
                source,
            })?;
        if address.ip().is_unspecified() {
            return Err(ServiceError::Argument {
                argument: "--advertise",
                reason: format!("must be given when listening on {address}"),
            });
        }
        let scheme = if self.security.serves_tls() {
            "https"
        } else {
            "http"
        };
        Ok(format!("{scheme}://{address}"))
    }
}

/// Where a server listens.
#[derive(Debug)]
pub struct Listeners {
    /// For everybody, by TLS where there is a certificate.
    pub public: TcpListener,
    /// On loopback and in plain text, for this process itself.
    pub local: Option<TcpListener>,
}

impl From<TcpListener> for Listeners {
    fn from(public: TcpListener) -> Self {
        Self {
            public,
            local: None,
        }
    }
}

/// Collects services, then serves them.
///
/// Message sizes are set on the generated server types (`max_decoding_message_size`), before they are added.
#[derive(Default)]
pub struct Server {
    routes: RoutesBuilder,
    names: Vec<&'static str>,
    rules: Rules,
    http: Vec<(axum::Router, Access)>,
    metrics: Option<axum::Router>,
    clients: Option<Arc<dyn Clients>>,
}

impl Server {
    /// A server without services.
    pub fn new() -> Self {
        Self::default()
    }

    /// Recognises clients by `clients`; without it a service has none.
    #[must_use]
    pub fn with_clients(mut self, clients: Arc<dyn Clients>) -> Self {
        self.clients = Some(clients);
        self
    }

    /// Adds a service for callers of the given access and reports its health by name.
    #[must_use]
    pub fn with<S>(mut self, service: S, access: Access) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.names.push(S::NAME);
        self.rules.service(S::NAME, access);
        self
    }

    /// Makes one method of a service, `/package.Service/Method`, an exception.
    #[must_use]
    pub fn method(mut self, path: &'static str, access: Access) -> Self {
        self.rules.method(path, access);
        self
    }

    /// Adds plain HTTP routes beside the gRPC services, on the same port, for callers of the given access.
    #[must_use]
    pub fn with_http(mut self, router: axum::Router, access: Access) -> Self {
        self.http.push((router, access));
        self
    }

    /// Shows `registry` at `/metrics`, to whom the configuration says.
    #[must_use]
    pub fn with_metrics(mut self, registry: Registry) -> Self {
        self.metrics = Some(metrics::router(registry));
        self
    }

    /// Serves on `listeners` until `shutdown` is cancelled and the drain is over.
    ///
    /// # Errors
    /// [`ServiceError::Server`], [`ServiceError::Reflection`].
    pub async fn serve(
        self,
        listeners: impl Into<Listeners>,
        config: &ServerConfig,
        shutdown: CancellationToken,
    ) -> Result<(), ServiceError> {
        let (health, health_service) = tonic_health::server::health_reporter();
        // The services' own; those below are always there.
        let names = self.names.clone();
        set_health(&health, &names, ServingStatus::Serving).await;
        let server = self
            .with(health_service, Access::Everyone)
            .with(reflection().build_v1()?, Access::Everyone)
            .with(reflection().build_v1alpha()?, Access::Everyone);

        let (speaks_http, routes) = server.guarded(config);
        let Listeners { public, local } = listeners.into();
        let tls = config.security.serving_tls();
        let local = local.map(|listener| (listener, None));
        let listeners = [(public, tls)].into_iter().chain(local);
        let cut = CancellationToken::new();
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_keepalive_interval(Some(PING_AFTER))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .accept_http1(speaks_http)
            .add_routes(routes.into())
            .serve_with_incoming_shutdown(
                connection::accept(listeners, &cut),
                shutdown.clone().cancelled_owned(),
            );
        let grace_over = async {
            shutdown.cancelled().await;
            set_health(&health, &names, ServingStatus::NotServing).await;
            tokio::time::sleep(config.drain_timeout).await;
        };
        tokio::pin!(serving);
        tokio::select! {
            served = &mut serving => return Ok(served?),
            () = grace_over => {}
        }
        tracing::warn!(
            drain_timeout_ms = config.drain_timeout.as_millis(),
            "grace period over: cutting the connections left"
        );
        cut.cancel();
        Ok(serving.await?)
    }

    /// All routes with the guard before them, and whether plain HTTP is among them.
    fn guarded(self, config: &ServerConfig) -> (bool, axum::Router) {
        let guard = Arc::new(Guard {
            peers: config.peers.clone(),
            clients: self.clients,
            complaints: Complaints::new(),
        });
        let behind = |router: axum::Router, door: Door| {
            router.layer(from_fn_with_state((Arc::clone(&guard), door), stand))
        };
        let grpc = self.routes.routes().into_axum_router();
        let mut routes = behind(grpc, Door::ByPath(Arc::new(self.rules)));
        let metrics_access = if config.security.public_metrics {
            Access::Everyone
        } else {
            Access::Insiders
        };
        let metrics = self.metrics.map(|router| (router, metrics_access));
        let mut speaks_http = false;
        for (router, access) in self.http.into_iter().chain(metrics) {
            speaks_http |= router.has_routes();
            routes = routes.merge(behind(router, Door::For(access)));
        }
        (speaks_http, routes)
    }
}

async fn set_health(health: &HealthReporter, names: &[&str], status: ServingStatus) {
    for name in names.iter().copied().chain([""]) {
        health.set_service_status(name, status).await;
    }
}

fn reflection<'a>() -> tonic_reflection::server::Builder<'a> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(specattn_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
