//! Traces across services: a span's context travels as W3C `traceparent`, in gRPC metadata and HTTP headers.
//!
//! A request that carries one goes on with its caller's trace; any other begins one.

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::codegen::http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// What a caller traces, if it does.
#[derive(Debug, Clone, Default)]
pub struct Parent(Context);

impl Parent {
    /// That of a request with these headers or metadata.
    pub fn of(headers: &HeaderMap) -> Self {
        // Not the thread's own context: a request without one begins a trace.
        let nobody = Context::new();
        let read = TraceContextPropagator::new().extract_with_context(&nobody, &Headers(headers));
        Self(read)
    }

    /// Makes `span` a part of it, and notes the trace's id in the span's field `trace_id`, for the logs.
    pub fn adopt(&self, span: &Span) {
        if self.0.span().span_context().is_valid() {
            // Where nothing traces there is no trace to be part of.
            let _ = span.set_parent(self.0.clone());
        }
        let context = span.context();
        let own = context.span().span_context().clone();
        if own.is_valid() {
            span.record("trace_id", tracing::field::display(own.trace_id()));
        }
    }
}

/// A request with `message` that is part of the current span.
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut headers = HeaderMap::new();
    let context = Span::current().context();
    TraceContextPropagator::new().inject_context(&context, &mut HeadersMut(&mut headers));
    let metadata = MetadataMap::from_headers(headers);
    tonic::Request::from_parts(metadata, Extensions::new(), message)
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = HeaderName::from_bytes(key.as_bytes());
        // An empty tracestate says nothing.
        if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value))
            && !value.is_empty()
        {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn traced(sampler: Sampler, test: impl FnOnce()) {
        let provider = SdkTracerProvider::builder().with_sampler(sampler).build();
        let layer = tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("test"))
            .with_context_activation(false);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, test);
    }

    #[test]
    fn a_trace_goes_from_caller_to_callee_whether_or_not_it_is_sent() {
        let goes_on = || {
            let span = || tracing::info_span!("session", trace_id = tracing::field::Empty);
            let context = |span: &Span| span.context().span().span_context().clone();
            let caller = span();
            Parent::default().adopt(&caller);
            let sent = caller.in_scope(|| request(()));
            assert!(sent.metadata().get("traceparent").is_some());
            assert!(sent.metadata().get("tracestate").is_none());
            let callee = span();
            Parent::of(sent.metadata().as_ref()).adopt(&callee);
            assert_eq!(context(&caller).trace_id(), context(&callee).trace_id());
            assert_eq!(context(&caller).is_sampled(), context(&callee).is_sampled());
            let other = span();
            Parent::of(&HeaderMap::new()).adopt(&other);
            assert_ne!(context(&caller).trace_id(), context(&other).trace_id());
        };
        traced(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)), goes_on);
        traced(Sampler::AlwaysOff, goes_on);
    }

    /// The same hundredth: 80 µs of a short request.
    #[test]
    fn a_request_s_spans_cost_far_less_than_a_hundredth_of_it() {
        let each = |sampler: Sampler| {
            let mut fastest = Duration::MAX;
            traced(sampler, || {
                for _ in 0..100 {
                    let start = Instant::now();
                    for _ in 0..10 {
                        let empty = tracing::field::Empty;
                        let span = tracing::info_span!("session", trace_id = empty);
                        Parent::default().adopt(&span);
                        for _ in 0..7 {
                            span.in_scope(|| drop(tracing::info_span!("stay").entered()));
                        }
                    }
                    fastest = fastest.min(start.elapsed() / 10);
                }
            });
            fastest
        };
        let (sent, unsent) = (each(Sampler::AlwaysOn), each(Sampler::AlwaysOff));
        eprintln!(
            "{} ns a request, {} where nothing is sent",
            sent.as_nanos(),
            unsent.as_nanos()
        );
        assert!(sent < Duration::from_micros(80), "{sent:?}");
    }

    #[test]
    fn nonsense_begins_a_trace_of_its_own() {
        for text in [
            "",
            "nonsense",
            "00-zz-zz-01",
            "ff-00000000000000000000000000000000-0000000000000000-01",
        ] {
            let mut headers = HeaderMap::new();
            headers.insert("traceparent", HeaderValue::from_static(text));
            let context = Parent::of(&headers).0;
            assert!(!context.span().span_context().is_valid(), "{text}");
        }
    }

    #[test]
    fn without_traces_a_request_carries_none() {
        assert!(request(()).metadata().is_empty());
    }
}
