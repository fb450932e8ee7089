//! Drafting ahead of verdicts, over a network that takes its time, for a target that does too. Both delays are injected:
//! a proxy holds every byte back, and the verify worker lengthens every forward. The text is the target's own all along.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use specattn_tests::network::Link;
use specattn_tests::session::open_request;
use specattn_tests::texts::references;
use specattn_tests::{DRAFT, Process, Session, VERIFY};

const ONE_WAY: Duration = Duration::from_millis(20);
const FORWARD_MS: &str = "40";
const TOKENS: u32 = 96;

/// The text of a session, its tokens per second from the 16th on, and its acceptance.
async fn run(
    verify: &Process,
    lookahead: &str,
    endpoint: &str,
    draft_length: u32,
) -> (Vec<u32>, f64) {
    let draft = Process::worker(DRAFT, &["--lookahead", lookahead]).await;
    let mut request = open_request(&references()[2].prompt, TOKENS);
    request.draft_length = draft_length;
    let mut session = Session::open(verify.channel().await, request)
        .await
        .unwrap();
    let attachment = session
        .attach(draft.channel().await, endpoint)
        .await
        .unwrap();
    session.at_least(16).await.unwrap();
    let (start, before) = (Instant::now(), session.tokens.len());
    let (_, stats) = session.finish().await.unwrap();
    let rate = (session.tokens.len() - before) as f64 / start.elapsed().as_secs_f64();
    println!(
        "{draft_length} draft tokens, lookahead {lookahead}: {rate:.1} tokens/s, {} of {} accepted",
        stats.accepted_tokens, stats.proposed_tokens
    );
    drop(attachment);
    (session.tokens, rate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn drafting_ahead_hides_the_way_and_the_wait() {
    let verify = Process::worker(
        VERIFY,
        &[
            "--inject-forward-delay-ms",
            FORWARD_MS,
            "--commit-interval-ms",
            "0",
        ],
    )
    .await;
    let far = Link::late(&verify, ONE_WAY).await;
    let (near_text, near) = run(&verify, "on", verify.uri(), 4).await;
    let (ahead_text, ahead) = run(&verify, "on", far.uri(), 4).await;
    let (unawaited_text, _) = run(&verify, "unawaited", far.uri(), 4).await;
    let (waiting_text, waiting) = run(&verify, "off", far.uri(), 4).await;
    assert_eq!(ahead_text, near_text);
    assert_eq!(unawaited_text, near_text);
    assert_eq!(waiting_text, near_text);
    println!(
        "ahead / waiting {:.2}, far / near {:.2}",
        ahead / waiting,
        ahead / near
    );
    assert!(ahead >= 1.3 * waiting, "{ahead} and {waiting} tokens/s");
    assert!(ahead >= 0.6 * near, "{ahead} and {near} tokens/s");
}
