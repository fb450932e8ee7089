//! Workers and sessions for the page, as `RegistryService.Status` tells them.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use specattn_proto::v1::{Mode, SessionStatus, WorkerStatus};

use crate::Gateway;

/// How things stand.
pub(super) async fn show(State(gateway): State<Arc<Gateway>>) -> Json<Value> {
    let workers: Vec<_> = gateway.registry.status().iter().map(worker).collect();
    let sessions: Vec<_> = gateway.sessions.status().iter().map(session).collect();
    Json(json!({
        "workers": workers,
        "sessions": sessions,
        "requests_queued": gateway.admission.queued(),
    }))
}

fn worker(status: &WorkerStatus) -> Value {
    let load = status.load.unwrap_or_default();
    let model = status.model.as_ref().map(|model| &model.name);
    json!({
        "worker_id": status.worker_id,
        "model": model,
        "endpoint": status.endpoint,
        "draining": load.draining,
        "sessions_active": load.sessions_active,
        "sessions_max": load.sessions_max,
        "kv_blocks_used": load.kv_blocks_used,
        "kv_blocks_total": load.kv_blocks_total,
        "tokens_total": load.tokens_total,
        "heartbeat_age_ms": status.heartbeat_age_ms,
    })
}

fn session(status: &SessionStatus) -> Value {
    let mode = match status.mode() {
        Mode::Dense => "dense",
        Mode::Sparse => "sparse",
        Mode::Exact => "exact",
        Mode::Unspecified => "unknown",
    };
    let draft = Some(&status.draft_worker_id).filter(|id| !id.is_empty());
    json!({
        "session_id": status.session_id,
        "mode": mode,
        "verify_worker_id": status.verify_worker_id,
        "draft_worker_id": draft,
        "prompt_tokens": status.prompt_tokens,
        "completion_tokens": status.completion_tokens,
        "age_ms": status.age_ms,
    })
}
