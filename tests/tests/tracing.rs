//! One request, one trace: spans of gateway, verify and draft worker reach a collector under one trace id, which stands in
//! all three logs; and nothing of what the client asked.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::{
    DraftPolicy, GenerateRequest, Limits, Mode, generate_request, generate_response,
};
use specattn_tests::cluster::gateway_at;
use specattn_tests::collector::{Collected, Collector, hex};
use specattn_tests::process::{DRAFT, Process, VERIFY, free_address};
use specattn_tests::{Cluster, until};
use tonic::Request;

/// A word that neither spans nor logs may have.
const SECRET: &str = "quicksilver";

/// What every request's trace is made of.
const SPANS: [&str; 8] = [
    "specattn-gateway session",
    "specattn-gateway queue",
    "specattn-gateway open",
    "specattn-verify verify",
    "specattn-verify prompt",
    "specattn-verify decode",
    "specattn-verify speculate",
    "specattn-draft draft",
];

const CLIENT_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT_SPAN: &str = "b7ad6b7169203331";

/// A request that takes long enough for a draft to take part.
fn request() -> Request<GenerateRequest> {
    Request::new(GenerateRequest {
        prompt: Some(generate_request::Prompt::Text(format!(
            "The {SECRET} ran over the floor of the old house, and"
        ))),
        limits: Some(Limits {
            max_tokens: Some(200),
            ignore_eos: true,
            ..Limits::default()
        }),
        draft: Some(DraftPolicy {
            draft_length: Some(4),
            ..DraftPolicy::default()
        }),
        mode: Mode::Exact.into(),
        ..GenerateRequest::default()
    })
}

async fn run(cluster: &Cluster, request: Request<GenerateRequest>) {
    let mut client = GenerationServiceClient::new(cluster.channel().await);
    let mut events = client.generate(request).await.unwrap().into_inner();
    let mut stats = None;
    while let Some(response) = events.message().await.unwrap() {
        if let Some(generate_response::Event::Finished(finished)) = response.event {
            stats = finished.stats;
        }
    }
    assert!(stats.unwrap().proposed_tokens > 0, "a draft took part");
}

/// Whether all spans of a request are among these.
fn is_whole(spans: &[Collected]) -> bool {
    let names: BTreeSet<String> = spans.iter().map(Collected::name).collect();
    SPANS.iter().all(|name| names.contains(*name))
}

/// Every span hangs on one of the same trace, the session's on `client`'s.
fn check_tree(spans: &[Collected], client: &str) {
    let ids: BTreeSet<String> = spans.iter().map(|s| hex(&s.span.span_id)).collect();
    for collected in spans {
        let parent = hex(&collected.span.parent_span_id);
        if collected.span.name == "session" {
            assert_eq!(parent, client);
        } else {
            assert!(
                ids.contains(&parent),
                "{} hangs on nothing",
                collected.name()
            );
        }
    }
    // A retry is a span of its own; tokens are not.
    assert!(spans.len() < 3 * SPANS.len(), "{} spans", spans.len());
}

#[tokio::test]
async fn one_request_is_one_trace_through_all_services() {
    let (collector, endpoint) = Collector::start().await;
    let traced = ["--otlp-endpoint", &endpoint, "--log-json"];
    let gateway = gateway_at(&free_address(), &traced).await;
    let mut line = vec!["--gateway", gateway.uri()];
    line.extend(traced);
    let verify = Process::worker(VERIFY, &line).await;
    let draft = Process::worker(DRAFT, &line).await;
    let cluster = Cluster::of(gateway, verify, vec![draft]).await;

    // The client traces the first request itself, the second begins a trace.
    let mut first = request();
    let parent = format!("00-{CLIENT_TRACE}-{CLIENT_SPAN}-01");
    first
        .metadata_mut()
        .insert("traceparent", parent.parse().unwrap());
    run(&cluster, first).await;
    run(&cluster, request()).await;

    let traces = || {
        let mut traces: BTreeMap<String, Vec<Collected>> = BTreeMap::new();
        for collected in collector.all() {
            traces
                .entry(collected.trace_id())
                .or_default()
                .push(collected);
        }
        traces
    };
    until("the spans of all services", || async {
        let traces = traces();
        traces.len() == 2 && traces.values().all(|spans| is_whole(spans))
    })
    .await;

    let traces = traces();
    check_tree(&traces[CLIENT_TRACE], CLIENT_SPAN);
    let (own, spans) = traces.iter().find(|(id, _)| *id != CLIENT_TRACE).unwrap();
    check_tree(spans, "");

    let processes = [&cluster.gateway, &cluster.verify, &cluster.drafts[0]];
    for process in processes {
        let log = process.log();
        for id in [own.as_str(), CLIENT_TRACE] {
            let line = log.lines().find(|line| line.contains(id));
            let line = line.unwrap_or_else(|| panic!("{id} is not in\n{log}"));
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let within = line["spans"].as_array().unwrap();
            assert!(within.iter().any(|span| span["trace_id"] == id), "{line}");
        }
        assert!(!log.contains(SECRET), "prompts are not logged");
    }
    assert!(
        !format!("{:?}", collector.all()).contains(SECRET),
        "prompts are not traced"
    );
}
