//! The services show what the Grafana dashboard asks for, and count what clients are told.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use serde_json::Value;
use specattn_tests::binaries::workspace;
use specattn_tests::metrics::Page;
use specattn_tests::{Cluster, Request, texts};

/// The expressions of all panels, those within rows included.
fn expressions(panels: &[Value], found: &mut Vec<String>) {
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            found.push(target["expr"].as_str().unwrap().to_owned());
        }
        expressions(
            panel["panels"].as_array().map_or(&[][..], Vec::as_slice),
            found,
        );
    }
}

/// The names of metrics in an expression.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| {
        ["gateway_", "verify_", "draft_"]
            .iter()
            .any(|service| word.starts_with(service))
    })
}

#[tokio::test]
async fn every_metric_of_the_dashboard_is_there_and_true() {
    let log = tempfile::tempdir().unwrap();
    let cluster = Cluster::start_with(1, &["--log-dir", log.path().to_str().unwrap()]).await;
    let prompt = texts::book(600);
    let request = Request::tokens(&prompt, 64).draft_length(4).exact();
    let completion = request.run(cluster.channel().await).await.unwrap();
    let stats = completion.stats;
    cluster.is_idle().await;

    let gateway = Page::of(&cluster.gateway).await;
    let verify = Page::of(&cluster.verify).await;
    let draft = Page::of(&cluster.drafts[0]).await;

    let file = workspace().join("deploy/dashboards/specattn.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut found = Vec::new();
    expressions(dashboard["panels"].as_array().unwrap(), &mut found);
    let wanted: BTreeSet<&str> = found
        .iter()
        .flat_map(|expression| names(expression))
        .collect();
    assert!(wanted.len() > 50, "the dashboard was read: {wanted:?}");
    let missing: Vec<_> = wanted
        .iter()
        .filter(|name| ![&gateway, &verify, &draft].iter().any(|p| p.has(name)))
        .collect();
    assert!(missing.is_empty(), "no service shows {missing:?}");

    let is = |page: &Page, name, value: u64| assert_eq!(page.value(name), value as f64, "{name}");
    is(&gateway, "gateway_requests_total", 1);
    is(&gateway, "gateway_tokens_prompt_total", prompt.len() as u64);
    is(&gateway, "gateway_tokens_completion_total", 64);
    is(&gateway, "gateway_first_token_seconds_count", 1);
    is(&gateway, "gateway_queue_wait_seconds_count", 1);
    is(&gateway, "gateway_sessions_active", 0);
    is(&gateway, "gateway_log_sessions", 1);
    is(&gateway, "gateway_workers", 2);
    is(&verify, "verify_tokens_committed_total", 64);
    is(
        &verify,
        "verify_tokens_proposed_total",
        stats.proposed_tokens,
    );
    is(
        &verify,
        "verify_tokens_accepted_total",
        stats.accepted_tokens,
    );
    is(
        &verify,
        "verify_kv_entries_read_total",
        stats.kv_entries_read,
    );
    is(
        &verify,
        "verify_kv_entries_dense_total",
        stats.kv_entries_dense,
    );
    is(&verify, "verify_mask_encoded_bytes_total", stats.mask_bytes);
    is(
        &verify,
        "verify_session_forwards_total",
        stats.target_forwards,
    );
    is(
        &verify,
        "verify_forward_duration_seconds_count",
        stats.target_forwards,
    );
    assert!(draft.value("draft_tokens_proposed_total") >= stats.proposed_tokens as f64);
    assert_eq!(
        verify.value("verify_kv_blocks_free"),
        verify.value("verify_kv_blocks_max")
    );
}
