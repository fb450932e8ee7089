//! The console: a page for people, on the gateway's own port, that shows workers, sessions and what becomes of their tokens.
//!
//! The page is files of this program and asks for nothing from elsewhere. Rates and latencies it takes from `/metrics`,
//! generations from the OpenAI API; here is what neither has: [`status`], and [`watch`] for one session.

mod status;
mod watch;

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use specattn_proto::Fault;

use crate::Gateway;
use crate::openai::ApiError;

const INDEX: &str = include_str!("page/index.html");

/// Name, media type and content of what the page loads.
const FILES: [(&str, &str, &str); 6] = [
    ("style.css", "text/css", include_str!("page/style.css")),
    ("app.js", "text/javascript", include_str!("page/app.js")),
    ("api.js", "text/javascript", include_str!("page/api.js")),
    (
        "metrics.js",
        "text/javascript",
        include_str!("page/metrics.js"),
    ),
    ("plot.js", "text/javascript", include_str!("page/plot.js")),
    (
        "session.js",
        "text/javascript",
        include_str!("page/session.js"),
    ),
];

/// The page takes nothing from elsewhere, and no other page may frame it.
const POLICY: &str = "default-src 'self'; img-src data:; frame-ancestors 'none'";

/// The page at `/`. It tells nothing of the gateway, so it needs no key; the reader types theirs into it.
pub(crate) fn page() -> Router {
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/console") }))
        .route("/console", get(|| async { content("text/html", INDEX) }))
        .route("/console/{file}", get(file))
}

/// What the page asks for. It shows the texts of all sessions, so it is for operators alone.
pub(crate) fn data(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/console/status", get(status::show))
        .route("/console/sessions/{id}", get(watch::text))
        .route("/console/sessions/{id}/kept", get(watch::kept))
        .with_state(gateway)
}

async fn file(Path(name): Path<String>) -> Result<Response, ApiError> {
    let found = FILES.iter().find(|(file, ..)| *file == name);
    let (_, media_type, text) =
        found.ok_or_else(|| Fault::NotFound("the console has no such file".to_owned()))?;
    Ok(content(media_type, text))
}

fn content(media_type: &str, text: &'static str) -> Response {
    let headers = [
        (CONTENT_TYPE, format!("{media_type}; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, POLICY.to_owned()),
        (X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        // A gateway of another version brings another page.
        (CACHE_CONTROL, "no-cache".to_owned()),
    ];
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_asks_nobody_else() {
        let texts = || FILES.iter().map(|(.., text)| *text).chain([INDEX]);
        let bytes: usize = texts().map(str::len).sum();
        assert!(bytes < 200_000, "{bytes} bytes");
        for text in texts() {
            let elsewhere = text
                .replace("http://www.w3.org/2000/svg", "")
                .contains("://");
            assert!(!elsewhere, "an address in: {text}");
        }
    }

    #[test]
    fn what_it_loads_is_there() {
        let names: Vec<_> = FILES.iter().map(|(name, ..)| *name).collect();
        let texts = FILES.iter().map(|(.., text)| *text).chain([INDEX]);
        let mut found = 0;
        for text in texts {
            for part in text.split("\"/console/").skip(1) {
                let name = part.split('"').next().unwrap();
                if name != "status" {
                    assert!(names.contains(&name), "{name}");
                    found += 1;
                }
            }
        }
        assert!(found >= 6, "{found}");
    }
}
