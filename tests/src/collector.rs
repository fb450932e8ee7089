//! [`Collector`]: an OpenTelemetry collector that keeps the spans it gets.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
pub use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A span and the service it is of.
#[derive(Debug, Clone)]
pub struct Collected {
    /// The service's name.
    pub service: String,
    /// The span.
    pub span: Span,
}

impl Collected {
    /// Service and span in two words.
    pub fn name(&self) -> String {
        format!("{} {}", self.service, self.span.name)
    }

    /// The trace's id in hexadecimal, as logs have it.
    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// See the module's text.
#[derive(Debug, Clone, Default)]
pub struct Collector(Arc<Mutex<Vec<Collected>>>);

impl Collector {
    /// A running one, and its URI.
    pub async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let collector = Self::default();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(collector.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        (collector, uri)
    }

    /// All spans so far.
    pub fn all(&self) -> Vec<Collected> {
        self.0.lock().unwrap().clone()
    }
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = attributes
                .into_iter()
                .find(|attribute| attribute.key == "service.name")
                .and_then(|attribute| attribute.value?.value);
            let Some(Value::StringValue(service)) = service else {
                return Err(Status::invalid_argument(
                    "spans of a service without a name",
                ));
            };
            let spans = resource.scope_spans.into_iter().flat_map(|s| s.spans);
            let mut kept = self.0.lock().unwrap();
            kept.extend(spans.map(|span| Collected {
                service: service.clone(),
                span,
            }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
