//! Processes that die, freeze or are asked to stop while a client reads its stream.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use specattn_proto::v1::{FinishReason, WorkerRole};
use specattn_tests::cluster::gateway_at;
use specattn_tests::process::free_address;
use specattn_tests::repeater::Repeater;
use specattn_tests::texts::references;
use specattn_tests::{Cluster, DRAFT, Process, Request, VERIFY, soon, until};
use tonic::Code;

/// Enough for a worker to be started while they are decoded.
const MANY: u32 = 2_000;

/// What a client must be told within after its verify worker died.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

fn prompt() -> Vec<u32> {
    references()[4].prompt.clone()
}

/// The target's own continuation, decoded without a draft.
async fn alone(cluster: &Cluster, tokens: u32) -> Vec<u32> {
    let request = Request::tokens(&prompt(), tokens).draft_length(0);
    let completion = request.run(cluster.channel().await).await.unwrap();
    assert_eq!(completion.tokens.len(), tokens as usize);
    completion.tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_draft_worker_is_not_missed_and_a_new_one_is_picked_up() {
    let mut cluster = Cluster::start(1).await;
    let expected = alone(&cluster, MANY).await;
    let request = Request::tokens(&prompt(), MANY).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(100).await.unwrap();
    cluster.drafts[0].kill();
    until("the draft to be missed", || async {
        let sessions = cluster.status().await.sessions;
        sessions
            .iter()
            .all(|session| session.draft_worker_id.is_empty())
    })
    .await;
    let with_first = stream.at_least(101).await.unwrap().tokens.len();
    // The stream goes on with nobody drafting.
    let halfway = stream.at_least(with_first + 50).await.unwrap().tokens.len();
    cluster.drafts.clear();
    cluster.add_draft().await;
    let completion = stream.finish().await.unwrap();
    assert_eq!(
        completion.tokens, expected,
        "tokens do not depend on who drafts"
    );
    assert_eq!(completion.reason, Some(FinishReason::Length));
    let accepted = completion.stats.accepted_tokens;
    println!(
        "{with_first} tokens with the first draft, {halfway} before the second, {accepted} accepted in all"
    );
    // More than the first can have had accepted, even if all that was read by then and all the stream held was its.
    assert!(
        accepted > halfway as u64,
        "{accepted} accepted, {halfway} tokens before the second draft"
    );
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_frozen_draft_worker_costs_a_timeout() {
    let cluster = Cluster::start(1).await;
    let expected = alone(&cluster, 600).await;
    let request = Request::tokens(&prompt(), 600).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(50).await.unwrap();
    cluster.drafts[0].signal("STOP");
    let completion = stream.finish().await.unwrap();
    cluster.drafts[0].signal("CONT");
    assert_eq!(completion.tokens, expected);
    assert!(
        completion.stats.solo_forwards > 100,
        "{:?}",
        completion.stats
    );
    // Awake again, it finds its session gone and is of use to the next.
    cluster.is_idle().await;
    cluster.knows(WorkerRole::Draft, 1).await;
    let request = Request::tokens(&prompt(), 200).draft_length(4);
    let completion = request.run(cluster.channel().await).await.unwrap();
    assert_eq!(completion.tokens, expected[..200]);
    assert!(completion.stats.accepted_tokens > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_verify_worker_is_reported_at_once() {
    // Where no other worker comes within the gateway's patience.
    let mut cluster = Cluster::start_with(1, &["--reopen-timeout-ms", "500"]).await;
    let request = Request::tokens(&prompt(), MANY).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    let got = stream.at_least(50).await.unwrap().tokens.len();
    cluster.verify.kill();
    let killed = Instant::now();
    let status = loop {
        match stream.next().await {
            Ok(true) => {}
            Ok(false) => {
                panic!("the stream ended as if all were well, after {got} tokens and more")
            }
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(!status.message().is_empty());
    assert!(
        killed.elapsed() < TOLD_WITHIN,
        "told after {:?}",
        killed.elapsed()
    );
    // The draft forgets the session, and the next client is told that there is no verify worker.
    cluster.drafts[0].is_idle().await;
    cluster.knows(WorkerRole::Verify, 0).await;
    let request = Request::tokens(&prompt(), 10);
    let status = request.run(cluster.channel().await).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_draining_verify_worker_ends_what_runs_and_takes_no_more() {
    let mut cluster = Cluster::start(1).await;
    let expected = alone(&cluster, 400).await;
    let request = Request::tokens(&prompt(), 400).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(20).await.unwrap();
    cluster.verify.signal("TERM");
    until("the gateway to hear of the drain", || async {
        let request = Request::tokens(&prompt(), 10);
        match request.run(cluster.channel().await).await {
            Ok(_) => false,
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                true
            }
        }
    })
    .await;
    let completion = stream.finish().await.unwrap();
    assert_eq!(completion.tokens, expected);
    assert_eq!(cluster.verify.ended().await, Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_draining_draft_worker_ends_in_time_and_changes_nothing() {
    let mut cluster = Cluster::start(1).await;
    let expected = alone(&cluster, 400).await;
    let request = Request::tokens(&prompt(), 400).draft_length(4);
    let mut stream = request.start(cluster.channel().await).await.unwrap();
    stream.at_least(20).await.unwrap();
    cluster.drafts[0].signal("TERM");
    let completion = stream.finish().await.unwrap();
    assert_eq!(completion.tokens, expected);
    let code = soon("the draft's end", cluster.drafts[0].ended()).await;
    assert_eq!(code, Some(0));
    cluster.drafts.clear();
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_said_twice_counts_once() {
    let verify = Process::worker(VERIFY, &[]).await;
    let repeater = Repeater::to(verify.uri()).await;
    repeater.say_twice(true);
    let uri = format!("http://{}", repeater.address());
    let gateway = gateway_at(&free_address(), &["--verify-endpoint", &uri]).await;
    let draft = Process::worker(DRAFT, &["--gateway", gateway.uri()]).await;
    let cluster = Cluster::of(gateway, verify, vec![draft]).await;
    let expected = alone(&cluster, 400).await;
    let drafted = Request::tokens(&prompt(), 400).draft_length(4);
    for request in [drafted.clone(), drafted.exact()] {
        let completion = request.run(cluster.channel().await).await.unwrap();
        assert_eq!(completion.tokens, expected);
        let stats = completion.stats;
        assert!(stats.accepted_tokens > 0, "{stats:?}");
    }
    cluster.is_idle().await;
}
