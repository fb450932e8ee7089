//! Logs and traces: structured events on stderr, as text or JSON lines, and spans for an OpenTelemetry collector.
//!
//! Spans go out only where `--otlp-endpoint` says whereto. Every session has a trace id without it too, the same in all
//! services, so that their logs can be put together. Prompts and completions are neither logged nor traced.

use std::io::IsTerminal;

use tracing_subscriber::filter::{EnvFilter, LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::args::{TelemetryArgs, TraceArgs};
use crate::collector::Collector;
use crate::error::ServiceError;

/// What the crates whose spans are traced are called like.
const TRACED: &str = "specattn";

/// The process's log and traces. Dropping it sends what spans are left: keep it until the process's end.
#[must_use = "spans are sent for as long as it is there"]
pub struct Telemetry {
    _collector: Collector,
}

/// Starts the process's log and traces; a collector knows it as `service`. Call once, before anything is worth logging.
///
/// # Errors
/// [`ServiceError::Telemetry`] for a filter that does not parse, or when a log is running already;
/// [`ServiceError::Argument`] for a collector's URI that is none.
pub fn init(
    log: &TelemetryArgs,
    traces: &TraceArgs,
    service: &'static str,
) -> Result<Telemetry, ServiceError> {
    let filter = EnvFilter::try_new(&log.log_level)
        .map_err(|error| ServiceError::Telemetry(format!("--log-level: {error}")))?;
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = if log.log_json {
        lines.json().boxed()
    } else {
        lines.boxed()
    };
    let collector = match &traces.otlp_endpoint {
        Some(endpoint) => Collector::at(endpoint, service)?,
        None => Collector::none(),
    };
    // Tasks are entered and left at every wake: neither is worth a note, nor a context that nobody else reads.
    let spans = tracing_opentelemetry::layer()
        .with_tracer(collector.tracer())
        .with_context_activation(false)
        .with_tracked_inactivity(false)
        .with_location(false)
        .with_threads(false)
        .with_target(false)
        .with_filter(Targets::new().with_target(TRACED, LevelFilter::INFO));
    tracing_subscriber::registry()
        .with(spans)
        .with(lines.with_filter(filter))
        .try_init()
        .map_err(|error| ServiceError::Telemetry(error.to_string()))?;
    Ok(Telemetry {
        _collector: collector,
    })
}
