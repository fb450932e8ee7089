//! The page at `/metrics`: a service's Prometheus metrics in the OpenMetrics text format.
//!
//! Each service has a registry of its own, also where several run in one process. Names begin with the service, units are
//! seconds, bytes and tokens, counters end in `_total`; labels come from closed sets, never from requests.

use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text;
use prometheus_client::registry::Registry;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The route that shows `registry`.
pub(crate) fn router(registry: Registry) -> Router {
    let registry = Arc::new(registry);
    Router::new().route("/metrics", get(move || show(Arc::clone(&registry))))
}

async fn show(registry: Arc<Registry>) -> impl IntoResponse {
    let mut page = String::new();
    match text::encode(&mut page, &registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, CONTENT_TYPE)], page),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            let plain = [(header::CONTENT_TYPE, "text/plain")];
            (StatusCode::INTERNAL_SERVER_ERROR, plain, error.to_string())
        }
    }
}
