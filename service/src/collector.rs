//! [`Collector`]: a process's spans on their way to an OpenTelemetry collector, by OTLP over gRPC.
//!
//! Nothing waits for the collector: ended spans stand in a bounded queue, and those that find it full are dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
    SpanExporter,
};
use tokio::runtime::Runtime;

use crate::channel;
use crate::error::ServiceError;

/// Ended spans that may wait to be sent.
const QUEUE_SPANS: usize = 4_096;

/// Longest time that an ended span waits to be sent.
const SEND_EVERY: Duration = Duration::from_secs(1);

/// Longest wait for the collector's answer, and for the last spans at the process's end.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);

/// What spans are made by.
const INSTRUMENTATION: &str = "specattn";

/// Where a process's spans go. Dropping it sends those that are left.
pub(crate) struct Collector {
    provider: SdkTracerProvider,
    /// Carries the connection: services stop their own runtimes before the last spans are sent.
    _runtime: Option<Runtime>,
}

impl Collector {
    /// No collector. Traces have ids all the same, for the logs.
    pub(crate) fn none() -> Self {
        let provider = SdkTracerProvider::builder().with_sampler(Sampler::AlwaysOff);
        Self {
            provider: provider.build(),
            _runtime: None,
        }
    }

    /// The collector at `endpoint`, which knows this process as `service`. It is connected to when there is something to send.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] for an endpoint that is no URI, [`ServiceError::System`] without a thread for it.
    pub(crate) fn at(endpoint: &str, service: &'static str) -> Result<Self, ServiceError> {
        let bad = |reason: String| ServiceError::Argument {
            argument: "--otlp-endpoint",
            reason,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("traces")
            .enable_all()
            .build()
            .map_err(|source| ServiceError::System {
                what: "starting the runtime of traces",
                source,
            })?;
        let entered = runtime.enter();
        let channel =
            channel::outward(endpoint, SEND_TIMEOUT).map_err(|fault| bad(fault.to_string()))?;
        let sending = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(channel)
            .with_timeout(SEND_TIMEOUT)
            .build()
            .map_err(|error| bad(error.to_string()))?;
        drop(entered);
        let exporter = Exporter {
            sending,
            failing: AtomicBool::new(false),
        };
        let queue = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE_SPANS)
            .with_scheduled_delay(SEND_EVERY)
            .build();
        let processor = BatchSpanProcessor::builder(exporter)
            .with_batch_config(queue)
            .build();
        let resource = Resource::builder().with_service_name(service).build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_span_processor(processor)
            .build();
        Ok(Self {
            provider,
            _runtime: Some(runtime),
        })
    }

    /// What makes spans for it.
    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer(INSTRUMENTATION)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // A collector that is gone has no use for them.
        let _ = self.provider.shutdown_with_timeout(SEND_TIMEOUT);
    }
}

/// Sends spans, and logs when the collector begins to fail and when it is back.
#[derive(Debug)]
struct Exporter {
    sending: opentelemetry_otlp::SpanExporter,
    failing: AtomicBool,
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.sending.export(batch).await;
        let failed_before = self.failing.swap(sent.is_err(), Ordering::Relaxed);
        match &sent {
            Err(error) if !failed_before => {
                tracing::warn!(%error, spans, "the collector takes no traces: they are lost until it does");
            }
            Ok(()) if failed_before => tracing::info!("the collector takes traces again"),
            _ => {}
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.sending.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.sending.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_must_be_a_uri() {
        for endpoint in ["", "collector:4317", "ftp://collector"] {
            let refused = Collector::at(endpoint, "test").err();
            let refused = refused.map(|error| error.to_string()).unwrap_or_default();
            assert!(refused.starts_with("--otlp-endpoint"), "{refused}");
        }
    }

    #[test]
    fn nobody_at_the_endpoint_holds_up_neither_start_nor_end() {
        let began = std::time::Instant::now();
        drop(Collector::at("http://127.0.0.1:9", "test").unwrap());
        assert!(began.elapsed() < 3 * SEND_TIMEOUT);
    }
}
