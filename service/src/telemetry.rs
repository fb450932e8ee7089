//! Logs: structured events on stderr, as text or JSON lines. Prompts and completions are never logged.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::args::TelemetryArgs;
use crate::error::ServiceError;

/// Starts the process's log. Call once, before anything is worth logging.
///
/// # Errors
/// [`ServiceError::Telemetry`] for a filter that does not parse, or when a log is running already.
pub fn init(args: &TelemetryArgs) -> Result<(), ServiceError> {
    let filter = EnvFilter::try_new(&args.log_level)
        .map_err(|error| ServiceError::Telemetry(format!("--log-level: {error}")))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let started = if args.log_json {
        log.json().try_init()
    } else {
        log.try_init()
    };
    started.map_err(|error| ServiceError::Telemetry(error.to_string()))
}
