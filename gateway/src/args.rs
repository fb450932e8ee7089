//! The command line of `specattn-gateway` and the [`Config`] it is checked into.

use std::path::PathBuf;
use std::time::Duration;

use specattn_proto::limits::MAX_DRAFT_LENGTH;
use specattn_proto::v1;
use specattn_proto::validate::{self, CheckedMaskPolicy};
use specattn_service::args::{ServerArgs, TelemetryArgs, TraceArgs};
use specattn_service::server::ServerConfig;

use crate::admission::AdmissionLimits;
use crate::clients::{AccessArgs, AccessConfig};
use crate::error::GatewayError;
use crate::known_workers;
use crate::log::{LogArgs, LogConfig};

/// How long a logged session goes on without its client, unless told otherwise: a client that lost its connection is back
/// by then.
const LINGER: Duration = Duration::from_secs(10);

/// SpecAttn gateway: the client API in front of verify and draft workers.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "specattn-gateway", version = specattn_proto::version::build())]
pub struct Args {
    /// Folder with the target model's tokenizer.json, or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    pub tokenizer: PathBuf,

    /// URI of a verify worker that does not register itself, or dns://NAME:PORT for all addresses of a name, or
    /// dns+https://NAME:PORT for the same by TLS; may be given several times
    #[arg(long, value_name = "URI", value_delimiter = ',')]
    pub verify_endpoint: Vec<String>,

    /// URI of a draft worker that does not register itself, or dns://NAME:PORT for all addresses of a name, or
    /// dns+https://NAME:PORT for the same by TLS; may be given several times
    #[arg(long, value_name = "URI", value_delimiter = ',')]
    pub draft_endpoint: Vec<String>,

    /// Sessions held at once; later requests wait
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_sessions: usize,

    /// Sessions of one client held at once; its later requests wait. Clients are told apart by API key; where none is wanted,
    /// by the metadata x-client-id, else by authorization, else by address
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_sessions_per_client: usize,

    /// Requests that may wait for a place, in all; later ones are refused
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_queued: usize,

    /// Milliseconds that a request may wait for a place; then it is refused
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    pub queue_timeout_ms: u64,

    /// Milliseconds that a session goes on after its client's stream broke [default: 10,000 with --log-dir, else 0]. With
    /// a log it can be resumed later too; without one it ends then
    #[arg(long, value_name = "MS")]
    pub linger_ms: Option<u64>,

    /// Milliseconds that a session whose verify worker was lost waits for another one to take it
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub reopen_timeout_ms: u64,

    /// Milliseconds between heartbeats of a worker; three missed ones remove it
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    pub heartbeat_interval_ms: u32,

    /// Milliseconds that a client may leave its full buffer unread before its session is cancelled
    #[arg(long, value_name = "MS", default_value_t = 30_000)]
    pub client_stall_timeout_ms: u64,

    /// Draft tokens per round where the request does not say, 0 to 16
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub draft_length: u32,

    /// Probability mass that mask selections reach in sparse mode where the request does not say, in (0, 1]; exact mode
    /// chooses its own
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    pub mask_p: f32,

    /// First positions that masks always keep where the request does not say
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub mask_sink: u32,

    /// Last positions that masks always keep where the request does not say
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub mask_window: u32,

    /// Positions that masks keep or drop together where the request does not say
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub mask_granularity: u32,

    /// What the HTTP API says and takes.
    #[command(flatten)]
    pub http: HttpArgs,

    /// The durable log of sessions.
    #[command(flatten)]
    pub log: LogArgs,

    /// Who may use the gateway.
    #[command(flatten)]
    pub access: AccessArgs,

    /// Where to listen, how to be reached, how to stop.
    #[command(flatten)]
    pub server: ServerArgs,

    /// What to log and how.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,

    /// Where traces go.
    #[command(flatten)]
    pub traces: TraceArgs,
}

/// What the HTTP API says and takes.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "HTTP API")]
pub struct HttpArgs {
    /// Name that HTTP clients ask for; may be given several times [default: the checkpoint's name]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub served_model_name: Vec<String>,

    /// File with the Jinja template that writes conversations as text [default: the checkpoint's own]
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
}

/// A gateway's checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder with the target model's tokenizer.json.
    pub tokenizer_dir: PathBuf,
    /// What the HTTP API says and takes.
    pub http: HttpArgs,
    /// Who may use the gateway.
    pub access: AccessConfig,
    /// How the server is reached and how it stops.
    pub server: ServerConfig,
    /// Verify workers that do not register themselves.
    pub verify_endpoints: Vec<String>,
    /// Draft workers that do not register themselves.
    pub draft_endpoints: Vec<String>,
    /// How much may run and wait.
    pub admission: AdmissionLimits,
    /// How long a session goes on without its client; `None`: ten seconds with a log, else not at all.
    pub linger: Option<Duration>,
    /// How long a session whose verify worker was lost waits for another one.
    pub reopen_timeout: Duration,
    /// The durable log of sessions.
    pub log: Option<LogConfig>,
    /// Time between heartbeats of a worker; three missed ones remove it.
    pub heartbeat_interval: Duration,
    /// How long a client may leave its full buffer unread.
    pub client_stall_timeout: Duration,
    /// Draft tokens per round where the request does not say.
    pub draft_length: u32,
    /// How masks are made where the request does not say.
    pub mask: CheckedMaskPolicy,
}

impl Config {
    /// The defaults of the command line, for the tokenizer in `tokenizer_dir`.
    pub fn new(tokenizer_dir: impl Into<PathBuf>) -> Self {
        Self {
            tokenizer_dir: tokenizer_dir.into(),
            http: HttpArgs::default(),
            access: AccessConfig::default(),
            server: ServerConfig::default(),
            verify_endpoints: Vec::new(),
            draft_endpoints: Vec::new(),
            admission: AdmissionLimits {
                sessions: 256,
                sessions_per_client: 64,
                queued: 256,
                queue_timeout: Duration::from_secs(10),
            },
            linger: None,
            reopen_timeout: Duration::from_secs(30),
            log: None,
            heartbeat_interval: Duration::from_secs(1),
            client_stall_timeout: Duration::from_secs(30),
            draft_length: 4,
            mask: CheckedMaskPolicy::default(),
        }
    }

    /// How long a session goes on without its client.
    pub(crate) fn linger(&self) -> Duration {
        let default = if self.log.is_some() {
            LINGER
        } else {
            Duration::ZERO
        };
        self.linger.unwrap_or(default)
    }
}

impl TryFrom<&Args> for Config {
    type Error = GatewayError;

    fn try_from(args: &Args) -> Result<Self, GatewayError> {
        let bad = |argument, reason: String| GatewayError::Argument { argument, reason };
        for (argument, endpoints) in [
            ("--verify-endpoint", &args.verify_endpoint),
            ("--draft-endpoint", &args.draft_endpoint),
        ] {
            for uri in endpoints {
                // A name stands for endpoints of the usual form.
                let plain = known_workers::name(uri).map_or_else(
                    || uri.clone(),
                    |(scheme, name)| format!("{scheme}://{name}"),
                );
                validate::endpoint("endpoint", &plain).map_err(|e| bad(argument, e.reason))?;
            }
        }
        for (argument, value) in [
            ("--max-sessions", args.max_sessions),
            ("--max-sessions-per-client", args.max_sessions_per_client),
        ] {
            if value == 0 {
                return Err(bad(argument, "must be at least 1".to_owned()));
            }
        }
        if !(20..=60_000).contains(&args.heartbeat_interval_ms) {
            return Err(bad(
                "--heartbeat-interval-ms",
                "must be between 20 and 60,000".to_owned(),
            ));
        }
        if args.draft_length > MAX_DRAFT_LENGTH {
            return Err(bad(
                "--draft-length",
                format!("must be at most {MAX_DRAFT_LENGTH}"),
            ));
        }
        let mask = v1::MaskPolicy {
            mask_p: Some(args.mask_p),
            sink_tokens: Some(args.mask_sink),
            window_tokens: Some(args.mask_window),
            granularity: Some(args.mask_granularity),
        };
        let (server, access) = args.access.config(&args.server)?;
        Ok(Self {
            tokenizer_dir: args.tokenizer.clone(),
            http: args.http.clone(),
            access,
            server,
            verify_endpoints: args.verify_endpoint.clone(),
            draft_endpoints: args.draft_endpoint.clone(),
            admission: AdmissionLimits {
                sessions: args.max_sessions,
                sessions_per_client: args.max_sessions_per_client,
                queued: args.max_queued,
                queue_timeout: Duration::from_millis(args.queue_timeout_ms),
            },
            linger: args.linger_ms.map(Duration::from_millis),
            reopen_timeout: Duration::from_millis(args.reopen_timeout_ms),
            log: args.log.config()?,
            heartbeat_interval: Duration::from_millis(args.heartbeat_interval_ms.into()),
            client_stall_timeout: Duration::from_millis(args.client_stall_timeout_ms),
            draft_length: args.draft_length,
            mask: validate::mask_policy(Some(&mask), CheckedMaskPolicy::default())
                .map_err(|e| bad("--mask-*", e.to_string()))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use specattn_service::args::{Service, command, parse_from};

    #[test]
    fn defaults_agree_with_the_command_line() {
        command::<Args>(Service::Gateway).debug_assert();
        let args: Args = parse_from(Service::Gateway, ["gateway", "--tokenizer", "x"]).unwrap();
        let config = Config::try_from(&args).unwrap();
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::new("x")));
    }

    #[test]
    fn out_of_range_values_are_refused() {
        for flags in [
            ["--mask-p", "0"],
            ["--mask-p", "NaN"],
            ["--mask-granularity", "0"],
            ["--draft-length", "17"],
            ["--max-sessions", "0"],
            ["--heartbeat-interval-ms", "0"],
            ["--verify-endpoint", "nowhere"],
        ] {
            let line = ["gateway", "--tokenizer", "x"].into_iter().chain(flags);
            let args: Args = parse_from(Service::Gateway, line).unwrap();
            assert!(Config::try_from(&args).is_err(), "{flags:?}");
        }
    }
}
