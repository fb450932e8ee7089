//! Sessions that outlive the processes that carry them: nothing committed is lost, nothing comes twice, and greedy text is
//! the one that an undisturbed run gives.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_proto::v1::{FinishReason, Sampling, StatusRequest, WorkerRole};
use specattn_tests::cluster::gateway_at;
use specattn_tests::process::{VERIFY, free_address};
use specattn_tests::texts::references;
use specattn_tests::{Cluster, Completion, Process, Request, until};
use tonic::transport::Channel;

/// Enough to be interrupted in.
const TOKENS: u32 = 800;

fn prompt() -> Vec<u32> {
    references()[4].prompt.clone()
}

fn plain() -> Request {
    Request::tokens(&prompt(), TOKENS).draft_length(0)
}

/// What an undisturbed session says.
async fn undisturbed(channel: Channel) -> Completion {
    let completion = plain().run(channel).await.unwrap();
    assert_eq!(completion.tokens.len(), TOKENS as usize);
    completion
}

fn same(got: &Completion, expected: &Completion) {
    let differs = got
        .tokens
        .iter()
        .zip(&expected.tokens)
        .position(|(a, b)| a != b);
    assert_eq!(differs, None, "the first token that differs");
    assert_eq!(got.tokens.len(), expected.tokens.len());
    assert_eq!(got.text, expected.text);
    assert_eq!(got.reason, Some(FinishReason::Length));
    assert_eq!(got.stats.completion_tokens, u64::from(TOKENS));
}

/// Where a session runs now.
async fn endpoint(cluster: &Cluster) -> String {
    let status = cluster.status().await;
    let id = &status.sessions[0].verify_worker_id;
    let worker = status.workers.iter().find(|worker| worker.worker_id == *id);
    worker.unwrap().endpoint.clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_verify_worker_costs_a_pause() {
    let mut cluster = Cluster::start(1).await;
    let expected = undisturbed(cluster.channel().await).await;
    let mut sampled = plain();
    sampled.0.sampling = Some(Sampling {
        temperature: 0.8,
        seed: Some(7),
        ..Sampling::default()
    });
    let sampled_expected = sampled.clone().run(cluster.channel().await).await.unwrap();
    let drafted = || Request::tokens(&prompt(), TOKENS).draft_length(4);
    let kinds = [
        ("alone", plain(), &expected),
        ("drafted", drafted(), &expected),
        ("exact", drafted().exact(), &expected),
        ("sampled", sampled, &sampled_expected),
    ];
    for (kind, request, expected) in kinds {
        let spare = Process::worker(VERIFY, &["--gateway", cluster.gateway.uri()]).await;
        cluster.knows(WorkerRole::Verify, 2).await;
        let mut stream = request.start(cluster.channel().await).await.unwrap();
        stream.at_least(150).await.unwrap();
        if endpoint(&cluster).await == cluster.verify.uri() {
            cluster.verify.kill();
            cluster.verify = spare;
        } else {
            drop(spare);
        }
        let completion = stream.finish().await.unwrap();
        println!(
            "{kind}: {} forwards, {} proposed, {} accepted",
            completion.stats.target_forwards,
            completion.stats.proposed_tokens,
            completion.stats.accepted_tokens
        );
        same(&completion, expected);
        assert!(
            completion.stats.target_forwards > 100,
            "{:?}",
            completion.stats
        );
        cluster.is_idle().await;
        cluster.knows(WorkerRole::Verify, 1).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_verify_worker_is_left_and_a_restarted_one_takes_its_sessions_back() {
    let mut cluster = Cluster::start(1).await;
    let expected = undisturbed(cluster.channel().await).await;
    // Killed, and back after a while.
    let request = Request::tokens(&prompt(), TOKENS).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(100).await.unwrap();
    cluster.verify.kill();
    cluster.knows(WorkerRole::Verify, 0).await;
    cluster.verify = Process::worker(VERIFY, &["--gateway", cluster.gateway.uri()]).await;
    same(&stream.finish().await.unwrap(), &expected);

    // Frozen: its connections stay open and say nothing.
    let mut stream = plain().start(cluster.channel().await).await.unwrap();
    stream.at_least(100).await.unwrap();
    cluster.verify.signal("STOP");
    let spare = Process::worker(VERIFY, &["--gateway", cluster.gateway.uri()]).await;
    same(&stream.finish().await.unwrap(), &expected);
    cluster.verify.signal("CONT");
    cluster.is_idle().await;
    spare.is_idle().await;
}

fn logged(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap().to_owned();
    vec!["--log-dir".to_owned(), dir]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_gateway_is_restarted_and_its_sessions_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = logged(dir.path());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut cluster = Cluster::start_with(1, &arguments).await;
    let expected = undisturbed(cluster.channel().await).await;
    let drafted = || Request::tokens(&prompt(), TOKENS).draft_length(4);
    for request in [drafted(), drafted().exact()] {
        let mut stream = request.start(cluster.channel().await).await.unwrap();
        stream.at_least(200).await.unwrap();
        cluster.gateway.kill();
        let mut completion = stream.broken().await;
        let address = cluster
            .gateway
            .uri()
            .strip_prefix("http://")
            .unwrap()
            .to_owned();
        cluster.gateway = gateway_at(&address, &arguments).await;
        // Its workers find it by themselves; until then it says that there is none.
        let resumed = loop {
            match Request::resume(cluster.channel().await, completion.clone()).await {
                Ok(stream) => break stream,
                Err(status) => {
                    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
                    completion = completion.clone();
                }
            }
        };
        let completion = resumed.finish().await.unwrap();
        same(&completion, &expected);
        // And once more from the log alone.
        let whole = Completion {
            started: completion.started.clone(),
            ..Completion::default()
        };
        let again = Request::resume(cluster.channel().await, whole)
            .await
            .unwrap();
        same(&again.finish().await.unwrap(), &expected);
        cluster.knows(WorkerRole::Draft, 1).await;
        cluster.is_idle().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn another_gateway_on_the_same_folder_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = logged(dir.path());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut cluster = Cluster::start_with(1, &arguments).await;
    let list = ["--verify-endpoint", cluster.verify.uri()];
    let draft = ["--draft-endpoint", cluster.drafts[0].uri()];
    let line = [&arguments[..], &list, &draft].concat();
    let second = gateway_at(&free_address(), &line).await;
    until("the second gateway to hear of both workers", || async {
        let mut registry = RegistryServiceClient::new(second.channel().await);
        let status = registry.status(StatusRequest {}).await.unwrap();
        status.into_inner().workers.len() == 2
    })
    .await;
    let expected = undisturbed(second.channel().await).await;
    let request = Request::tokens(&prompt(), TOKENS).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(200).await.unwrap();
    cluster.gateway.kill();
    let completion = stream.broken().await;
    let resumed = Request::resume(second.channel().await, completion)
        .await
        .unwrap();
    same(&resumed.finish().await.unwrap(), &expected);
    cluster.verify.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_vanishes_comes_back_early_or_late() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = logged(dir.path());
    let mut line: Vec<&str> = arguments.iter().map(String::as_str).collect();
    line.extend(["--linger-ms", "300"]);
    let cluster = Cluster::start_with(1, &line).await;
    let expected = undisturbed(cluster.channel().await).await;
    let request = Request::tokens(&prompt(), TOKENS).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(60).await.unwrap();
    // Back at once.
    let left = stream.leave();
    let mut stream = Request::resume(cluster.channel().await, left)
        .await
        .unwrap();
    stream.at_least(200).await.unwrap();
    // Back when the session has been suspended: nothing of it is left at the workers.
    let left = stream.leave();
    if left.tokens.len() < TOKENS as usize {
        until("the session to be suspended", || async {
            cluster.status().await.sessions.is_empty()
        })
        .await;
        cluster.is_idle().await;
    }
    let resumed = Request::resume(cluster.channel().await, left)
        .await
        .unwrap();
    same(&resumed.finish().await.unwrap(), &expected);
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_disk_refuses_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = logged(dir.path());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let cluster = Cluster::start_with(0, &arguments).await;
    let expected = undisturbed(cluster.channel().await).await;
    let mut stream = plain().start(cluster.channel().await).await.unwrap();
    stream.at_least(100).await.unwrap();
    // As good as a full disk: no file of the process may grow any more.
    let written = cluster.status().await.gateway.unwrap().log_bytes;
    cluster.gateway.limit_file_size(Some(written + 300));
    let completion = stream.broken().await;
    assert!(completion.tokens.len() < TOKENS as usize);
    let refused = plain().run(cluster.channel().await).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    cluster.is_idle().await;
    // Room again: the session goes on.
    cluster.gateway.limit_file_size(None);
    let resumed = Request::resume(cluster.channel().await, completion)
        .await
        .unwrap();
    same(&resumed.finish().await.unwrap(), &expected);
}
