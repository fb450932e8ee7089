//! [`AllInOne`]: gateway, verify worker and draft worker inside this process, talking over loopback gRPC exactly as
//! separate processes would.
//!
//! The workers are configured through their own command lines, so that their defaults and their environment fallbacks
//! hold here too.

use std::ffi::OsString;
use std::fmt::Display;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, ValueEnum};
use specattn_draft::LookaheadMode;
use specattn_gateway::{AccessConfig, HttpArgs, LogConfig};
use specattn_proto::Fault;
use specattn_proto::v1;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_service::args::{Service, parse_from};
use specattn_service::channel::Dialer;
use specattn_service::guard::Peers;
use specattn_service::server::{Listeners, ServerConfig};
use specattn_service::{Secrets, ServiceError};
use specattn_worker::Patience;
use tokio::net::TcpListener;
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::args::ModelArgs;
use crate::error::CliError;
use crate::models::ModelFolders;
use crate::pair;
use crate::progress;

/// How long the workers may take to register after their models have loaded.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause between two looks at who has registered.
const REGISTRATION_POLL: Duration = Duration::from_millis(10);

const GATEWAY: &str = "gateway";
const VERIFY: &str = "verify worker";
const DRAFT: &str = "draft worker";

/// What to start.
#[derive(Debug)]
pub struct Plan {
    folders: ModelFolders,
    models: ModelArgs,
    show_progress: bool,
    /// Whether sessions take over what others have processed of a common beginning.
    pub share_prefixes: bool,
    /// How the gateway is reached and how long it drains.
    pub server: ServerConfig,
    /// Who may use the gateway.
    pub access: AccessConfig,
    /// What the gateway's HTTP API says and takes.
    pub http: HttpArgs,
    /// The gateway's session log.
    pub log: Option<LogConfig>,
    /// Where the gateway listens; `None`: a free loopback port.
    pub listener: Option<TcpListener>,
}

impl Plan {
    /// Finds the models that `args` name, and fetches what is not here.
    ///
    /// # Errors
    /// [`CliError::Usage`] when they are not there or do not go together, [`CliError::Hub`] when they cannot be fetched.
    pub async fn new(
        args: &ModelArgs,
        with_draft: bool,
        show_progress: bool,
    ) -> Result<Self, CliError> {
        let models = args.clone();
        let finding = tokio::task::spawn_blocking(move || {
            let folders = ModelFolders::find(&models, with_draft)?;
            pair::check(&folders)?;
            Ok::<_, CliError>((folders, models))
        });
        let found = finding.await.map_err(|error| failed("models", error))?;
        let (folders, models) = found?;
        Ok(Self {
            folders,
            models,
            show_progress,
            share_prefixes: true,
            server: ServerConfig::default(),
            access: AccessConfig::default(),
            http: HttpArgs::default(),
            log: None,
            listener: None,
        })
    }

    /// What the draft worker runs, as a flag and its value; `None`: there is none.
    fn draft_model(&self) -> Option<(&'static str, &Path)> {
        let random = self.models.random_draft_weights.as_deref();
        let random = random.map(|config| ("--random-weights", config));
        let folder = self.folders.draft.as_deref();
        random.or(folder.map(|folder| ("--model", folder)))
    }

    /// A worker's checked arguments, as its own program would get them; `model` is a flag and its value.
    fn worker_args<A: CommandFactory + FromArgMatches>(
        &self,
        service: Service,
        (flag, model): (&str, &Path),
        gateway: &str,
    ) -> Result<A, CliError> {
        let mut line: Vec<OsString> = vec!["worker".into(), flag.into(), model.into()];
        let mut flag = |name: &str, value: String| line.extend([name.into(), value.into()]);
        flag("--threads", self.models.threads.to_string());
        let kv_cache_mib = match service {
            Service::Draft => self.models.draft_kv_cache_mib,
            _ => None,
        };
        let kv_cache_mib = kv_cache_mib.unwrap_or(self.models.kv_cache_mib);
        flag("--kv-cache-mib", kv_cache_mib.to_string());
        if let Some(name) = self.models.kv_type.and_then(|t| t.to_possible_value()) {
            flag("--kv-type", name.get_name().to_owned());
        }
        match service {
            Service::Draft => {
                if let Some(device) = self.models.draft_device() {
                    flag("--device", device.to_string());
                }
            }
            _ => {
                if let Some(device) = &self.models.device {
                    flag("--device", device.to_string());
                }
                if let Some(ranks) = self.models.tensor_parallel {
                    flag("--tensor-parallel", ranks.to_string());
                }
            }
        }
        flag("--gateway", gateway.to_owned());
        flag("--listen", "127.0.0.1:0".to_owned());
        let drain_timeout = self.server.drain_timeout.as_millis();
        flag("--drain-timeout-ms", drain_timeout.to_string());
        if service == Service::Verify
            && self.draft_model().is_some()
            && self.models.share_a_device()
        {
            line.push("--draft-shares-device".into());
        }
        if !self.share_prefixes {
            line.push("--no-prefix-sharing".into());
        }
        parse_from(service, line).map_err(|error| CliError::Usage(error.to_string()))
    }
}

/// How a worker of this process and its gateway know each other.
#[derive(Debug)]
struct Own {
    /// Where the gateway is reached from here.
    gateway: String,
    /// What both show; `None` where nothing is wanted.
    secret: Option<Secrets>,
}

impl Own {
    /// Lets nobody but the gateway call the worker, where that is wanted.
    fn protect(&self, server: &mut ServerConfig) {
        if let Some(secret) = &self.secret {
            server.security.secret = Some(secret.clone());
            server.peers = Peers::Secrets(vec![secret.clone()]);
        }
    }
}

/// The services of this process. Dropping it ends them without a drain.
#[derive(Debug)]
pub struct AllInOne {
    url: String,
    gateway: JoinHandle<Result<(), CliError>>,
    gateway_stop: CancellationToken,
    workers: JoinSet<Result<(), CliError>>,
    workers_stop: CancellationToken,
}

impl AllInOne {
    /// Starts everything and waits until the workers have registered.
    ///
    /// # Errors
    /// [`CliError::Start`] when a service cannot start.
    pub async fn start(mut plan: Plan) -> Result<Self, CliError> {
        let listeners = match plan.listener.take() {
            // The services of this process have a way of their own: they need no certificate for it.
            Some(public) => Listeners {
                public,
                local: Some(loopback().await?),
            },
            None => loopback().await?.into(),
        };
        let url = match &plan.server.advertise {
            Some(url) => url.clone(),
            None => url_of(&listeners.public, plan.server.security.serves_tls())?,
        };
        let local = url_of(listeners.local.as_ref().unwrap_or(&listeners.public), false)?;
        let (verify, draft) = plan.access.own_workers(&mut plan.server).unzip();
        let own = |secret: Option<Secrets>| Own {
            gateway: local.clone(),
            secret,
        };
        let (verify, draft) = (own(verify), own(draft));
        let gateway_stop = CancellationToken::new();
        let gateway = specattn_gateway::serve(
            specattn_gateway::Config {
                server: plan.server.clone(),
                access: plan.access.clone(),
                http: plan.http.clone(),
                log: plan.log.clone(),
                ..specattn_gateway::Config::new(&plan.folders.target)
            },
            listeners,
            gateway_stop.clone(),
        );
        let mut services = Self {
            url,
            gateway: tokio::spawn(ending(GATEWAY, gateway)),
            gateway_stop,
            workers: JoinSet::new(),
            workers_stop: CancellationToken::new(),
        };
        services.start_verify_worker(&plan, &verify).await?;
        if let Some(model) = plan.draft_model() {
            services.start_draft_worker(&plan, model, &draft).await?;
        }
        services.wait_for_workers(&verify).await?;
        Ok(services)
    }

    /// The gateway's URL.
    pub fn gateway(&self) -> &str {
        &self.url
    }

    /// Completes when a service ends that nobody stopped, with what it has to say.
    pub async fn failure(&mut self) -> CliError {
        tokio::select! {
            ended = &mut self.gateway => early_end(GATEWAY, ended),
            Some(ended) = self.workers.join_next() => early_end("worker", ended),
        }
    }

    /// Lets running sessions end. The workers stop first, taking no new sessions while the gateway still carries the
    /// running ones to their clients.
    ///
    /// # Errors
    /// The first failure of a service on its way out.
    pub async fn drain(mut self) -> Result<(), CliError> {
        let mut result = Ok(());
        self.workers_stop.cancel();
        while let Some(ended) = self.workers.join_next().await {
            result = result.and(flatten("worker", ended));
        }
        self.gateway_stop.cancel();
        result.and(flatten(GATEWAY, (&mut self.gateway).await))
    }

    /// Ends everything within `timeout`; what goes wrong then no longer matters to anyone.
    pub async fn stop(self, timeout: Duration) {
        match tokio::time::timeout(timeout, self.drain()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "a service failed while stopping"),
            Err(_) => tracing::warn!("the services did not stop in time"),
        }
    }
}

impl AllInOne {
    async fn start_verify_worker(&mut self, plan: &Plan, own: &Own) -> Result<(), CliError> {
        let model = match &plan.models.random_weights {
            Some(config) => ("--random-weights", config.as_path()),
            None => ("--model", plan.folders.target.as_path()),
        };
        let args: specattn_verify::Args = plan.worker_args(Service::Verify, model, &own.gateway)?;
        let mut config = args.config()?;
        own.protect(&mut config.server);
        let worker = load("target", VERIFY, plan.show_progress, move |progress| {
            specattn_verify::Worker::load(config, progress)
        })
        .await?;
        let serving = worker.serve(loopback().await?, self.workers_stop.clone());
        self.workers.spawn(ending(VERIFY, serving));
        Ok(())
    }

    async fn start_draft_worker(
        &mut self,
        plan: &Plan,
        model: (&str, &Path),
        own: &Own,
    ) -> Result<(), CliError> {
        let args: specattn_draft::Args = plan.worker_args(Service::Draft, model, &own.gateway)?;
        let mut config = args.config()?;
        if plan.models.share_a_device() {
            config.model.limits.gather = Patience::Verdicts;
            if config.drafting.lookahead == LookaheadMode::Auto {
                // Whatever the draft does ahead, the target waits for.
                config.drafting.lookahead = LookaheadMode::Off;
            }
        }
        own.protect(&mut config.server);
        let worker = load("draft", DRAFT, plan.show_progress, move |progress| {
            specattn_draft::Worker::load(config, progress)
        })
        .await?;
        let serving = worker.serve(loopback().await?, self.workers_stop.clone());
        self.workers.spawn(ending(DRAFT, serving));
        Ok(())
    }

    /// Waits until the gateway knows every worker, so that the first request finds them.
    async fn wait_for_workers(&mut self, own: &Own) -> Result<(), CliError> {
        let wanted = self.workers.len();
        let dialer = Dialer::new(None, own.secret.clone());
        let registered = async {
            let mut client = RegistryServiceClient::new(dialer.connect(&own.gateway).await?);
            while client
                .status(v1::StatusRequest {})
                .await?
                .into_inner()
                .workers
                .len()
                < wanted
            {
                tokio::time::sleep(REGISTRATION_POLL).await;
            }
            Ok(())
        };
        tokio::select! {
            registered = tokio::time::timeout(REGISTRATION_TIMEOUT, registered) => {
                registered.unwrap_or_else(|_| {
                    let message = "the workers did not register in time".to_owned();
                    Err(Fault::DeadlineExceeded(message).into())
                })
            }
            failure = self.failure() => Err(failure),
        }
    }
}

/// Loads a model on a thread of its own, with a progress bar named `what`.
async fn load<W, E>(
    what: &str,
    service: &'static str,
    show_progress: bool,
    load: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<W, E> + Send + 'static,
) -> Result<W, CliError>
where
    W: Send + 'static,
    E: Display + Send + 'static,
{
    let bar = progress::bar(&format!("loading the {what} model"), show_progress);
    let advancing = bar.clone();
    let loading = tokio::task::spawn_blocking(move || {
        load(&mut |done, total| progress::advance(&advancing, done, total))
    });
    let loaded = loading.await;
    bar.finish_and_clear();
    match loaded {
        Ok(Ok(worker)) => Ok(worker),
        Ok(Err(error)) => Err(failed(service, error)),
        Err(panicked) => Err(failed(service, panicked)),
    }
}

/// `serving`, with its error named after the service.
async fn ending<E: Display>(
    service: &'static str,
    serving: impl Future<Output = Result<(), E>>,
) -> Result<(), CliError> {
    serving.await.map_err(|error| failed(service, error))
}

fn failed(service: &'static str, reason: impl Display) -> CliError {
    CliError::Start {
        service,
        reason: reason.to_string(),
    }
}

type Ended = Result<Result<(), CliError>, JoinError>;

fn flatten(service: &'static str, ended: Ended) -> Result<(), CliError> {
    ended.unwrap_or_else(|panicked| Err(failed(service, panicked)))
}

fn early_end(service: &'static str, ended: Ended) -> CliError {
    match flatten(service, ended) {
        Ok(()) => failed(service, "it ended by itself"),
        Err(error) => error,
    }
}

async fn loopback() -> Result<TcpListener, CliError> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = TcpListener::bind(address).await;
    listener.map_err(|source| ServiceError::Listen { address, source }.into())
}

/// The URL under which this machine reaches a listener.
fn url_of(listener: &TcpListener, tls: bool) -> Result<String, CliError> {
    let mut address = listener
        .local_addr()
        .map_err(|source| ServiceError::System {
            what: "asking the socket for its address",
            source,
        })?;
    if address.ip().is_unspecified() {
        // Listening everywhere includes loopback, of the same family or, for IPv6, of both.
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        });
    }
    let scheme = if tls { "https" } else { "http" };
    Ok(format!("{scheme}://{address}"))
}
