//! Client channels: how one service reaches another, and what it shows of itself on the way.
//!
//! Nagle is off, since rounds are small messages that wait for each other. HTTP/2 pings notice a peer whose host froze
//! or whose network went away; a peer that merely died is noticed by its closed socket.

use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use specattn_proto::Fault;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::secret::Secrets;
use crate::tls::Tls;

/// Longest wait for a connection, TLS included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Silence after which a peer is pinged.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Wait for the ping's answer. With the interval before it, a dead peer is noticed within 2.8 seconds.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(1_800);

/// Longest wait for what [`ping`] asks.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// The metadata key of credentials.
pub(crate) const AUTHORIZATION: &str = "authorization";

/// A channel that shows the caller's credentials with every request.
pub type Link = InterceptedService<Channel, Credentials>;

/// Times a health check over `link`: the round trip to a service, with as little of its work in it as can be.
///
/// # Errors
/// [`Fault::Unavailable`] when nobody answers in a second.
pub async fn ping(link: Link) -> Result<Duration, Fault> {
    let began = Instant::now();
    let mut client = HealthClient::new(link);
    let checked = client.check(HealthCheckRequest::default());
    match tokio::time::timeout(PING_TIMEOUT, checked).await {
        Ok(Ok(_)) => Ok(began.elapsed()),
        Ok(Err(status)) => Err(Fault::from_status(&status)),
        Err(_) => Err(Fault::Unavailable("no answer to a health check".to_owned())),
    }
}

/// What a caller shows of itself, besides its certificate.
#[derive(Debug, Clone, Default)]
pub struct Credentials(Option<Secrets>);

impl Interceptor for Credentials {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secrets) = &self.0 {
            let metadata = request.metadata_mut();
            metadata.insert(AUTHORIZATION, secrets.header());
        }
        Ok(request)
    }
}

/// Connects to other services: in plain text to `http` URIs, by TLS to `https` ones.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    tls: Option<Tls>,
    credentials: Credentials,
}

impl Dialer {
    /// One with this certificate and these authorities, which shows these secrets.
    pub fn new(tls: Option<Tls>, secrets: Option<Secrets>) -> Self {
        Self {
            tls,
            credentials: Credentials(secrets),
        }
    }

    /// A link that connects when first used, and again whenever the connection was lost. Needs a running Tokio runtime.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when `uri` is no http or https URI.
    pub fn connect_lazy(&self, uri: &str) -> Result<Link, Fault> {
        let channel = self.route(uri)?.with(tuned).lazy();
        Ok(self.showing(channel))
    }

    /// A link that is connected now.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`] when `uri` is no http or https URI; [`Fault::Unavailable`] when nobody answers there, or
    /// not the right one.
    pub async fn connect(&self, uri: &str) -> Result<Link, Fault> {
        let connected = match self.route(uri)?.with(tuned) {
            Route::Plain(endpoint) => endpoint.connect().await,
            Route::Tls(endpoint, tls, uri) => {
                let connector = connector(tls, uri);
                endpoint.connect_with_connector(connector).await
            }
        };
        let channel = connected.map_err(|error| unreachable_because(uri, &error))?;
        Ok(self.showing(channel))
    }

    fn showing(&self, channel: Channel) -> Link {
        InterceptedService::new(channel, self.credentials.clone())
    }

    fn route(&self, text: &str) -> Result<Route, Fault> {
        let uri = specattn_proto::validate::endpoint("endpoint", text)?;
        if uri.scheme_str() != Some("https") {
            return Ok(Route::Plain(Endpoint::from(uri)));
        }
        let tls = match &self.tls {
            Some(tls) => tls.clone(),
            None => Tls::of_the_system()
                .map_err(|error| Fault::FailedPrecondition(error.to_string()))?,
        };
        // The connector below does TLS itself, so that changed certificates are taken up. Tonic must not try as well, which
        // it would for a URI of scheme https.
        let plain = text.replacen("https", "http", 1);
        let plain = specattn_proto::validate::endpoint("endpoint", &plain)?;
        let endpoint = Endpoint::from(plain).origin(uri.clone());
        Ok(Route::Tls(endpoint, tls, uri))
    }
}

enum Route {
    Plain(Endpoint),
    Tls(Endpoint, Tls, Uri),
}

impl Route {
    fn with(self, tune: impl FnOnce(Endpoint) -> Endpoint) -> Self {
        match self {
            Self::Plain(endpoint) => Self::Plain(tune(endpoint)),
            Self::Tls(endpoint, tls, uri) => Self::Tls(tune(endpoint), tls, uri),
        }
    }

    fn lazy(self) -> Channel {
        match self {
            Self::Plain(endpoint) => endpoint.connect_lazy(),
            Self::Tls(endpoint, tls, uri) => {
                endpoint.connect_with_connector_lazy(connector(tls, uri))
            }
        }
    }
}

/// Connects to `uri`, whatever it is asked, with the certificates of now.
fn connector(
    tls: Tls,
    uri: Uri,
) -> impl tower::Service<
    Uri,
    Response = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>,
    Error = std::io::Error,
    Future: Send,
> + Send
+ 'static {
    tower::service_fn(move |_: Uri| {
        let (tls, uri) = (tls.clone(), uri.clone());
        async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let name = tls.name_of(&host).map_err(std::io::Error::other)?;
            let bare = host.trim_start_matches('[').trim_end_matches(']');
            let port = uri.port_u16().unwrap_or(443);
            let stream = TcpStream::connect((bare, port)).await?;
            stream.set_nodelay(true)?;
            let connector = TlsConnector::from(tls.client());
            let stream = connector.connect(name, stream).await?;
            Ok(TokioIo::new(stream))
        }
    })
}

fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
}

fn unreachable_because(uri: &str, error: &dyn std::error::Error) -> Fault {
    let mut reason = error;
    while let Some(source) = reason.source() {
        reason = source;
    }
    Fault::Unavailable(format!("cannot connect to {uri}: {reason}"))
}

/// How the `http` URI is to be connected to.
///
/// # Errors
/// [`Fault::InvalidArgument`] when it is none.
pub fn endpoint(uri: &str) -> Result<Endpoint, Fault> {
    let uri = specattn_proto::validate::endpoint("endpoint", uri)?;
    Ok(tuned(Endpoint::from(uri)))
}

/// A channel to an `http` URI that shows nothing, connected now.
///
/// # Errors
/// As [`Dialer::connect`]'s.
pub async fn connect(uri: &str) -> Result<Channel, Fault> {
    let connected = endpoint(uri)?.connect().await;
    connected.map_err(|error| unreachable_because(uri, &error))
}

/// A channel to a server that is none of ours, which connects when first used and waits `timeout` for each answer. It sends
/// no pings, for which many servers cut a caller off, and trusts whom the system trusts.
///
/// # Errors
/// [`Fault::InvalidArgument`] when `uri` is no http or https URI.
pub(crate) fn outward(uri: &str, timeout: Duration) -> Result<Channel, Fault> {
    let plainly = |endpoint: Endpoint| {
        let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
        endpoint.timeout(timeout)
    };
    Ok(Dialer::default().route(uri)?.with(plainly).lazy())
}
