//! However a session ends, nothing of it stays: no session, no KV block, on either worker.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::{CancelRequest, FinishReason};
use specattn_tests::process::{DRAFT, VERIFY};
use specattn_tests::session::open_request;
use specattn_tests::texts::references;
use specattn_tests::{Cluster, Process, Request, Session};
use tonic::Code;

fn prompt() -> Vec<u32> {
    references()[2].prompt.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_ending_frees_everything() {
    let cluster = Cluster::start(1).await;
    let channel = cluster.channel().await;
    let plain = || Request::tokens(&prompt(), 1_500).draft_length(4);
    let whole = Request::tokens(&prompt(), 60)
        .run(channel.clone())
        .await
        .unwrap();
    assert_eq!(whole.reason, Some(FinishReason::Length));
    cluster.is_idle().await;

    // A stop token: the first token whose like has not come before.
    let stop = (20..60)
        .find(|&i| !whole.tokens[..i].contains(&whole.tokens[i]))
        .unwrap();
    let mut request = plain();
    let limits = request.0.limits.as_mut().unwrap();
    limits.stop_token_ids = vec![whole.tokens[stop]];
    let stopped = request.run(channel.clone()).await.unwrap();
    assert_eq!(stopped.reason, Some(FinishReason::Stop));
    assert_eq!(stopped.tokens, whole.tokens[..=stop]);
    cluster.is_idle().await;

    // A stop string.
    let words: Vec<&str> = whole.text.split_whitespace().collect();
    let word = words[words.len() / 2];
    let mut request = plain();
    request.0.stop = vec![word.to_owned()];
    let stopped = request.run(channel.clone()).await.unwrap();
    assert_eq!(stopped.reason, Some(FinishReason::Stop));
    assert_eq!(Some(stopped.text.as_str()), whole.text.split(word).next());
    cluster.is_idle().await;

    // A deadline.
    let mut request = plain();
    request.0.deadline_ms = Some(150);
    let late = request.run(channel.clone()).await.unwrap();
    assert_eq!(late.reason, Some(FinishReason::Deadline));
    assert!(late.tokens.len() < 1_500);
    cluster.is_idle().await;

    // A cancel by id.
    let mut stream = plain().start(channel.clone()).await.unwrap();
    let started = stream.at_least(10).await.unwrap().started.clone().unwrap();
    let cancel = CancelRequest {
        session_id: started.session_id,
    };
    let mut client = GenerationServiceClient::new(channel.clone());
    client.cancel(cancel.clone()).await.unwrap();
    let cancelled = stream.finish().await.unwrap();
    assert_eq!(cancelled.reason, Some(FinishReason::Cancelled));
    cluster.is_idle().await;
    assert_eq!(
        client.cancel(cancel).await.unwrap_err().code(),
        Code::NotFound
    );

    // A client that goes away, with the prompt half processed and in the middle of the answer.
    let long = Request::tokens(&references()[19].prompt, 500).draft_length(4);
    drop(long.start(channel.clone()).await.unwrap());
    let mut stream = plain().start(channel.clone()).await.unwrap();
    stream.at_least(10).await.unwrap();
    drop(stream);
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_could_never_fit_is_refused_and_all_else_takes_turns() {
    let arguments = ["--kv-cache-mib", "32", "--max-sessions", "3"];
    let folder = specattn_tests::process::target();
    let line = [
        &["--model", folder.to_str().unwrap(), "--threads", "1"][..],
        &arguments,
    ]
    .concat();
    let verify = Process::start(VERIFY, &line).await;
    let channel = verify.channel().await;
    let load = verify.load().await;
    assert_eq!(load.kv_blocks_used, 0);
    let tokens = u32::try_from(load.kv_blocks_total).unwrap() * 64;
    let most = tokens - 17 - prompt().len() as u32;
    let refused = Session::open(channel.clone(), open_request(&prompt(), most + 1))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    // One that will need the whole cache leaves room to others until it does.
    let mut first = Session::open(channel.clone(), open_request(&prompt(), most))
        .await
        .unwrap();
    let mut second = Session::open(channel.clone(), open_request(&prompt(), 40))
        .await
        .unwrap();
    second.finish().await.unwrap();
    first.at_least(20).await.unwrap();
    drop(first);
    verify.is_idle().await;

    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(
            Session::open(channel.clone(), open_request(&prompt(), 400))
                .await
                .unwrap(),
        );
    }
    let refused = Session::open(channel.clone(), open_request(&prompt(), 1))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    drop(open);
    verify.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_draft_that_detaches_leaves_nothing() {
    let verify = Process::worker(VERIFY, &[]).await;
    let draft = Process::worker(DRAFT, &[]).await;
    let mut session = Session::open(verify.channel().await, open_request(&prompt(), 800))
        .await
        .unwrap();
    let attachment = session
        .attach(draft.channel().await, verify.uri())
        .await
        .unwrap();
    session.at_least(30).await.unwrap();
    drop(attachment);
    draft.is_idle().await;
    // It may come back, and is told of the end.
    let attachment = session
        .attach(draft.channel().await, verify.uri())
        .await
        .unwrap();
    let (reason, stats) = session.finish().await.unwrap();
    assert_eq!(reason, FinishReason::Length);
    assert!(stats.accepted_tokens > 0);
    assert!(attachment.detached().await.contains("over"));
    draft.is_idle().await;
    verify.is_idle().await;

    // A verify worker that is not there, and a session that it does not know.
    let session = Session::open(verify.channel().await, open_request(&prompt(), 800))
        .await
        .unwrap();
    let nobody = format!("http://{}", specattn_tests::process::free_address());
    let unreachable = session
        .attach(draft.channel().await, &nobody)
        .await
        .unwrap_err();
    assert_eq!(unreachable.code(), Code::Unavailable, "{unreachable}");
    let other = Process::worker(VERIFY, &[]).await;
    let unknown = session
        .attach(draft.channel().await, other.uri())
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    tokio::time::sleep(Duration::from_millis(20)).await;
    draft.is_idle().await;
}
