//! Workers come, go and die.

use std::time::{Duration, Instant};

use crate::support::*;
use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{DraftPolicy, FinishReason, ModelInfo, StatusResponse};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

fn draft_of(status: &StatusResponse) -> String {
    let session = status.sessions.first();
    session.map_or_else(String::new, |session| session.draft_worker_id.clone())
}

#[tokio::test]
async fn without_a_verify_worker_requests_are_refused() {
    let gateway = start_gateway(quick_config()).await;
    let mut client = Client::new(&gateway).await;
    assert_eq!(client.refusal(request(2)).await.label(), "unavailable");
}

#[tokio::test]
async fn a_lost_verify_worker_is_reported_soon() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script::default());
    let worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(1_000)).await.unwrap();
    next(&mut stream).await.unwrap();
    let began = Instant::now();
    worker.kill().await;
    let got = loop {
        match next(&mut stream).await {
            Ok(Some(Event::Delta(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(fault) => break fault,
        }
    };
    assert_eq!(got.label(), "unavailable", "{got}");
    assert!(began.elapsed() < Duration::from_secs(5));
    client.wait_for_workers(0).await;
}

/// Passes bytes between callers and `target` until it freezes: connections stay open and nothing moves.
async fn freezable(target: &str) -> (String, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}", listener.local_addr().unwrap());
    let target = target.strip_prefix("http://").unwrap().to_owned();
    let freeze = CancellationToken::new();
    let frozen = freeze.clone();
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let (target, frozen) = (target.clone(), frozen.clone());
            tokio::spawn(async move {
                let mut far = TcpStream::connect(target).await.unwrap();
                tokio::select! {
                    moved = tokio::io::copy_bidirectional(&mut near, &mut far) => drop(moved),
                    () = frozen.cancelled() => std::future::pending().await,
                }
            });
        }
    });
    (uri, freeze)
}

#[tokio::test]
async fn a_frozen_verify_worker_is_reported_soon() {
    let verify = FakeVerify::new(Script {
        pace: Duration::from_millis(10),
        ..Script::default()
    });
    let worker = verify.start(None).await;
    let (uri, freeze) = freezable(&worker.uri).await;
    let mut config = quick_config();
    config.verify_endpoints = vec![uri];
    let gateway = start_gateway(config).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(1_000)).await.unwrap();
    next(&mut stream).await.unwrap();
    next(&mut stream).await.unwrap();
    freeze.cancel();
    let began = Instant::now();
    let fault = loop {
        match next(&mut stream).await {
            Ok(Some(Event::Delta(_))) => {}
            Ok(other) => panic!("{other:?}"),
            Err(fault) => break fault,
        }
    };
    assert_eq!(fault.label(), "unavailable", "{fault}");
    assert!(began.elapsed() < Duration::from_secs(5));
    client.wait_for_workers(0).await;
}

#[tokio::test]
async fn a_full_or_dead_worker_is_passed_over() {
    let gateway = start_gateway(quick_config()).await;
    let mut client = Client::new(&gateway).await;
    let full = FakeVerify::new(Script {
        refuse: Some(Fault::exhausted("no blocks")),
        ..Script::default()
    });
    let _full = full.start(Some(&gateway.uri)).await;
    client.wait_for_workers(1).await;
    assert_eq!(
        client.refusal(request(2)).await.label(),
        "resource_exhausted"
    );
    let verify = FakeVerify::new(Script::default());
    let _worker = verify.start(Some(&gateway.uri)).await;
    client.wait_for_workers(2).await;
    for _ in 0..3 {
        let got = read(client.generate(request(4)).await.unwrap()).await;
        assert_eq!(got.tokens.len(), 4);
    }
    assert_eq!(verify.opened().len(), 3);
}

#[tokio::test]
async fn sessions_spread_over_workers() {
    let gateway = start_gateway(quick_config()).await;
    let workers = [
        FakeVerify::new(Script::default()),
        FakeVerify::new(Script::default()),
    ];
    let mut running = Vec::new();
    for worker in &workers {
        running.push(worker.start(Some(&gateway.uri)).await);
    }
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(2).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(client.generate(request(1_000)).await.unwrap());
    }
    assert_eq!(workers[0].opened().len(), 2);
    assert_eq!(workers[1].opened().len(), 2);
}

#[tokio::test]
async fn a_draft_is_attached_replaced_and_picked_up_later() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        pace: Duration::from_millis(10),
        block: 1,
        ..Script::default()
    });
    let verify_worker = verify.start(Some(&gateway.uri)).await;
    let first = FakeDraft::new();
    let first_worker = first.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(2).await;
    let mut stream = client.generate(request(1_000)).await.unwrap();
    let status = client
        .wait_for("a draft", |s| !draft_of(s).is_empty())
        .await;
    let first_id = draft_of(&status);
    let attach = &first.attached()[0];
    assert_eq!(attach.verify_endpoint, verify_worker.uri);
    assert_eq!(attach.token_ids[..3], [5, 6, 7]);
    assert_eq!(attach.policy.unwrap().draft_length, Some(4));
    assert_eq!(attach.max_tokens_total, 1_003);

    // It dies; the session goes on alone.
    first_worker.kill().await;
    client
        .wait_for("no draft", |s| draft_of(s).is_empty())
        .await;
    next(&mut stream).await.unwrap();
    next(&mut stream).await.unwrap();

    // Another one starts and is picked up, with the tokens so far.
    let second = FakeDraft::new();
    let _second_worker = second.start(Some(&gateway.uri)).await;
    let status = client
        .wait_for("another draft", |s| !draft_of(s).is_empty())
        .await;
    assert_ne!(draft_of(&status), first_id);
    assert!(second.attached()[0].token_ids.len() > 3);
    assert_eq!(verify.running(), 1);
}

#[tokio::test]
async fn drafts_that_do_not_fit_or_have_no_room_are_left_alone() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        pace: Duration::from_millis(10),
        ..Script::default()
    });
    let _verify = verify.start(Some(&gateway.uri)).await;
    let mut misfit = FakeDraft::new();
    misfit.model.vocab_size = 4_096;
    let _misfit = misfit.start(Some(&gateway.uri)).await;
    let mut full = FakeDraft::new();
    full.full = true;
    let _full = full.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(3).await;
    let got = read(client.generate(request(60)).await.unwrap()).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Length);
    assert!(misfit.attached().is_empty());
    let asked = full.attached().len();
    assert!((1..=8).contains(&asked), "asked {asked} times");

    let mut alone = request(5);
    alone.draft = Some(DraftPolicy {
        draft_length: Some(0),
        ..DraftPolicy::default()
    });
    read(client.generate(alone).await.unwrap()).await;
    assert_eq!(full.attached().len(), asked);
}

#[tokio::test]
async fn listed_workers_need_not_register() {
    let verify = FakeVerify::new(Script::default());
    let verify_worker = verify.start(None).await;
    let draft = FakeDraft::new();
    let draft_worker = draft.start(None).await;
    let mut config = quick_config();
    config.verify_endpoints = vec![verify_worker.uri.clone()];
    // By name, as behind a headless service; and one that is not there.
    let port = draft_worker.uri.rsplit_once(':').unwrap().1;
    config.draft_endpoints = vec![
        format!("dns://localhost:{port}"),
        "http://127.0.0.1:1".to_owned(),
    ];
    let gateway = start_gateway(config).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(2).await;
    let got = read(client.generate(request(5)).await.unwrap()).await;
    assert_eq!(got.tokens.len(), 5);
    verify_worker.kill().await;
    client.wait_for_workers(1).await;
}

#[tokio::test]
async fn a_foreign_tokenizer_is_refused() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        model: ModelInfo {
            tokenizer_hash: "0".repeat(64),
            ..model()
        },
        ..Script::default()
    });
    let _worker = verify.start(Some(&gateway.uri)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut client = Client::new(&gateway).await;
    assert!(client.status().await.workers.is_empty());
}

#[tokio::test]
async fn a_lying_verify_worker_fails_only_its_session() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        wrong_start: Some(u64::MAX),
        ..Script::default()
    });
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let got = read(client.generate(request(5)).await.unwrap()).await;
    assert_eq!(got.fault.unwrap().label(), "internal");
    assert!(client.status().await.sessions.is_empty());
}
