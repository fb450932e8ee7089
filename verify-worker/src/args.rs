//! The command line, and the checked configuration made of it.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser};
use specattn_service::ServiceError;
use specattn_service::args::{RegistrationArgs, ServerArgs, TelemetryArgs, TraceArgs};
use specattn_service::server::ServerConfig;
use specattn_worker::Patience;
use specattn_worker::args::{IoArgs, ModelArgs, ModelConfig};

/// SpecAttn verify worker: runs the target model and decides what is committed
#[derive(Debug, Clone, Parser)]
#[command(name = "specattn-verify", version = specattn_proto::version::build())]
pub struct Args {
    /// The target model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Drafts and masks.
    #[command(flatten)]
    pub speculation: SpeculationArgs,
    /// What sessions tell their gateway, and when.
    #[command(flatten)]
    pub sessions: SessionArgs,
    /// Where to listen.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Threads of the server.
    #[command(flatten)]
    pub io: IoArgs,
    /// Where to register.
    #[command(flatten)]
    pub registration: RegistrationArgs,
    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
    /// Where traces go.
    #[command(flatten)]
    pub traces: TraceArgs,
}

/// How drafts are waited for and where the layer map is.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Speculation")]
pub struct SpeculationArgs {
    /// Milliseconds a session waits for its draft's next proposal before it goes on alone
    #[arg(long, value_name = "MS", default_value_t = 100)]
    pub draft_timeout_ms: u64,

    /// Drafts compute on this worker's own device: a batch then waits a little for sessions whose drafts are at work, instead of
    /// keeping them from it
    #[arg(long)]
    pub draft_shares_device: bool,

    /// Calibrated layer map [default: alignment.json in the model folder, if there is one]
    #[arg(long, value_name = "FILE")]
    pub alignment: Option<PathBuf>,
}

/// How sessions report to their gateway.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Sessions")]
pub struct SessionArgs {
    /// Least milliseconds between two messages of committed tokens of one session; tokens committed in between travel
    /// together, so a model that is faster than this does not spend its time on messages. 0 sends every commit at once
    #[arg(long, value_name = "MS", default_value_t = 10)]
    pub commit_interval_ms: u64,
}

/// A verify worker's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The target model.
    pub model: ModelConfig,
    /// How long a session waits for its draft's next proposal.
    pub draft_timeout: Duration,
    /// Least time between two messages of committed tokens of one session.
    pub commit_interval: Duration,
    /// The layer map's file; `None` looks for it in the model folder.
    pub alignment: Option<PathBuf>,
    /// The server.
    pub server: ServerConfig,
    /// The gateway to register with.
    pub gateway: Option<String>,
}

impl Args {
    /// Checks the arguments.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] names the one that is out of range.
    pub fn config(&self) -> Result<Config, ServiceError> {
        let mut model = self.model.config()?;
        if self.speculation.draft_shares_device {
            model.limits.gather = Patience::Drafts;
        }
        Ok(Config {
            model,
            draft_timeout: Duration::from_millis(self.speculation.draft_timeout_ms),
            commit_interval: Duration::from_millis(self.sessions.commit_interval_ms),
            alignment: self.speculation.alignment.clone(),
            server: self.server.worker_config()?,
            gateway: self.registration.config()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use specattn_service::args::{Service, command, parse_from};

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command::<Args>(Service::Verify).debug_assert();
        let args: Args = parse_from(
            Service::Verify,
            ["x", "--model", "m", "--draft-timeout-ms", "7"],
        )
        .unwrap();
        let config = args.config().unwrap();
        assert_eq!(config.draft_timeout, Duration::from_millis(7));
        assert!(config.gateway.is_none());
    }
}
