//! Argument groups that services flatten into their own, and the rule that names the environment fallback of every
//! flag: `--drain-timeout-ms` of the verify worker falls back to `SPECATTN_VERIFY_DRAIN_TIMEOUT_MS`.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Command, CommandFactory, FromArgMatches};
use tokio::net::TcpListener;

use crate::error::ServiceError;
use crate::guard::Peers;
use crate::security::SecurityArgs;
use crate::server::ServerConfig;

/// Which process this is: names its environment variables and its usual port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Service {
    /// The gateway.
    Gateway,
    /// A verify worker.
    Verify,
    /// A draft worker.
    Draft,
}

impl Service {
    /// What its environment variables start with.
    pub const fn env_prefix(self) -> &'static str {
        match self {
            Self::Gateway => "SPECATTN_GATEWAY",
            Self::Verify => "SPECATTN_VERIFY",
            Self::Draft => "SPECATTN_DRAFT",
        }
    }

    /// Where it listens unless told otherwise: on loopback, where callers need no credentials.
    pub const fn default_listen(self) -> &'static str {
        match self {
            Self::Gateway => "127.0.0.1:7400",
            Self::Verify => "127.0.0.1:7401",
            Self::Draft => "127.0.0.1:7402",
        }
    }
}

/// The command of `A` with the service's environment fallbacks and its own default for `--listen`.
pub fn command<A: CommandFactory>(service: Service) -> Command {
    let command = A::command().mut_args(|arg| match arg.get_long() {
        Some(long) => {
            let name = long.replace('-', "_").to_uppercase();
            arg.env(format!("{}_{name}", service.env_prefix()))
        }
        None => arg,
    });
    let listens = command.get_arguments().any(|arg| arg.get_id() == "listen");
    if listens {
        command.mut_arg("listen", |arg| {
            arg.required(false).default_value(service.default_listen())
        })
    } else {
        command
    }
}

/// Parses the process's command line; prints help or what is wrong and exits when there is nothing to run.
pub fn parse<A: CommandFactory + FromArgMatches>(service: Service) -> A {
    parse_from(service, std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Parses the given command line, the program's name first.
///
/// # Errors
/// What clap finds wrong; `--help` and `--version` come as errors too.
pub fn parse_from<A: CommandFactory + FromArgMatches>(
    service: Service,
    line: impl IntoIterator<Item = impl Into<OsString> + Clone>,
) -> Result<A, clap::Error> {
    let mut command = command::<A>(service);
    let mut matches = command.try_get_matches_from_mut(line)?;
    A::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// Where to listen, how to be reached, how to stop.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR")]
    pub listen: SocketAddr,

    /// URI under which other services reach this one [default: http:// or https:// and the listening address]
    #[arg(long, value_name = "URI")]
    pub advertise: Option<String>,

    /// Milliseconds that running sessions get to end after SIGTERM or SIGINT
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    pub drain_timeout_ms: u64,

    /// What the service shows, whom it trusts, and who may call it.
    #[command(flatten)]
    pub security: SecurityArgs,
}

impl ServerArgs {
    /// The checked configuration of the server, which no other service may call yet.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] for an `--advertise` that is no http URI, [`ServiceError::File`] for a file that cannot be
    /// used.
    pub fn config(&self) -> Result<ServerConfig, ServiceError> {
        if let Some(uri) = &self.advertise {
            specattn_proto::validate::endpoint("advertise", uri).map_err(|invalid| {
                ServiceError::Argument {
                    argument: "--advertise",
                    reason: invalid.reason,
                }
            })?;
        }
        Ok(ServerConfig {
            advertise: self.advertise.clone(),
            drain_timeout: Duration::from_millis(self.drain_timeout_ms),
            security: self.security.load()?,
            peers: Peers::Nobody,
        })
    }

    /// The same for a worker, which gateways may call.
    ///
    /// # Errors
    /// As above; [`ServiceError::Argument`] where anybody could call it.
    pub fn worker_config(&self) -> Result<ServerConfig, ServiceError> {
        let config = self.config()?;
        Ok(ServerConfig {
            peers: config.security.worker_peers(self.listen)?,
            ..config
        })
    }

    /// Binds the listening socket.
    ///
    /// # Errors
    /// [`ServiceError::Listen`].
    pub async fn bind(&self) -> Result<TcpListener, ServiceError> {
        TcpListener::bind(self.listen)
            .await
            .map_err(|source| ServiceError::Listen {
                address: self.listen,
                source,
            })
    }
}

/// What to log and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logs")]
pub struct TelemetryArgs {
    /// What to log, as a tracing filter: a level, or target=level pairs separated by commas
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log_level: String,

    /// Log one JSON object a line instead of text
    #[arg(long)]
    pub log_json: bool,
}

/// Where traces go.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Traces")]
pub struct TraceArgs {
    /// URI of an OpenTelemetry collector to send traces to, by OTLP over gRPC [default: none are sent]
    #[arg(long, value_name = "URI", env = "SPECATTN_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
}

/// Where a worker makes itself known.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Registration")]
pub struct RegistrationArgs {
    /// URI of the gateway to register with; without it the gateway must know this worker from a list
    #[arg(long, value_name = "URI")]
    pub gateway: Option<String>,
}

impl RegistrationArgs {
    /// The checked gateway URI.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] when it is no http URI.
    pub fn config(&self) -> Result<Option<String>, ServiceError> {
        let Some(uri) = &self.gateway else {
            return Ok(None);
        };
        specattn_proto::validate::endpoint("gateway", uri).map_err(|invalid| {
            ServiceError::Argument {
                argument: "--gateway",
                reason: invalid.reason,
            }
        })?;
        Ok(Some(uri.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Example {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        telemetry: TelemetryArgs,
        #[command(flatten)]
        registration: RegistrationArgs,
    }

    #[test]
    fn each_service_has_its_port_and_names() {
        command::<Example>(Service::Draft).debug_assert();
        let args: Example = parse_from(Service::Draft, ["x"]).unwrap();
        assert_eq!(
            args.server.listen.to_string(),
            Service::Draft.default_listen()
        );
        let help = command::<Example>(Service::Verify)
            .render_long_help()
            .to_string();
        for needle in [
            "SPECATTN_VERIFY_DRAIN_TIMEOUT_MS",
            "SPECATTN_VERIFY_LOG_JSON",
            "7401",
        ] {
            assert!(help.contains(needle), "{needle} is missing in:\n{help}");
        }
    }

    #[test]
    fn uris_are_checked() {
        let line = [
            "x",
            "--advertise",
            "nonsense",
            "--gateway",
            "http://gateway:7400",
        ];
        let args: Example = parse_from(Service::Draft, line).unwrap();
        assert!(args.server.config().is_err());
        assert!(args.registration.config().unwrap().is_some());
    }
}
