//! One session for the page: its text token by token with how each came about, and what its masks keep.
//!
//! The text is a line of JSON for everything that is new, until the session's end. It is read from the transcript when the
//! page has taken the line before, so a slow page gets longer lines and nothing waits for it. What masks keep is asked of
//! the verify worker when the page asks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{InspectRequest, InspectResponse};
use specattn_proto::{Fault, SessionId};

use crate::Gateway;
use crate::openai::ApiError;
use crate::transcript::{End, Watcher};

/// Parts of the context that what masks keep is told by.
const COLUMNS: u32 = 160;

/// Longest wait for a verify worker's answer.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Lines of a session's text.
pub(super) async fn text(
    State(gateway): State<Arc<Gateway>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let id: SessionId = id.parse().map_err(Fault::from)?;
    let entry = gateway.sessions.recent(id);
    let facts = entry.as_ref().and_then(|entry| entry.facts());
    let facts = facts.ok_or_else(|| Fault::NotFound(format!("no session {id}")))?;
    let begin = json!({ "prompt_tokens": facts.recipe.prompt().len() });
    let watcher = Watcher::new(Arc::clone(&facts.transcript));
    let lines = stream::unfold((Some(begin), Some(watcher)), |(begin, watcher)| async {
        if let Some(begin) = begin {
            return Some((line(&begin), (None, watcher)));
        }
        let mut watcher = watcher?;
        let news = watcher.next().await;
        let pieces: Vec<_> = news
            .pieces
            .into_iter()
            .map(|(text, origin)| json!([text, i32::from(origin)]))
            .collect();
        let value = match &news.end {
            Some(end) => json!({ "pieces": pieces, "end": ending(end) }),
            None => json!({ "pieces": pieces }),
        };
        let next = news.end.is_none().then_some(watcher);
        Some((line(&value), (None, next)))
    });
    let headers = [(CONTENT_TYPE, "application/x-ndjson")];
    Ok((headers, Body::from_stream(lines)).into_response())
}

fn line(value: &Value) -> Result<String, Infallible> {
    Ok(format!("{value}\n"))
}

fn ending(end: &End) -> String {
    match end {
        Ok(finished) => {
            let name = finished.reason().as_str_name();
            let reason = name.trim_start_matches("FINISH_REASON_").to_lowercase();
            format!("finished: {reason}")
        }
        Err(fault) => fault.to_string(),
    }
}

/// What a session's masks keep now.
pub(super) async fn kept(
    State(gateway): State<Arc<Gateway>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let id: SessionId = id.parse().map_err(Fault::from)?;
    let entry = gateway.sessions.recent(id);
    let entry = entry.ok_or_else(|| Fault::NotFound(format!("no session {id}")))?;
    let worker = entry.verify_worker();
    let Some(worker) = worker.and_then(|worker| gateway.registry.worker(worker)) else {
        return Ok(shares(InspectResponse::default()));
    };
    let mut client = VerifyServiceClient::new(worker.channel);
    let asking = client.inspect(InspectRequest {
        session_id: id.to_string(),
        columns: COLUMNS,
    });
    let answer = tokio::time::timeout(INSPECT_TIMEOUT, asking)
        .await
        .map_err(|_| Fault::DeadlineExceeded(format!("{} does not answer", worker.id)))?;
    match answer.map_err(|status| Fault::from_status(&status)) {
        Ok(answer) => Ok(shares(answer.into_inner())),
        // It has ended, or moves.
        Err(Fault::NotFound(_)) => Ok(shares(InspectResponse::default())),
        Err(fault) => Err(fault.into()),
    }
}

/// Shares by layer and column; none where there are no masks.
fn shares(map: InspectResponse) -> Json<Value> {
    Json(json!({
        "tokens": map.tokens,
        "num_layers": map.num_layers,
        "columns": map.columns,
        "kept": map.kept,
    }))
}
