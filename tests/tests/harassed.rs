//! Draft workers that mean harm without end: sessions they were given, and those beside them, have the target's own tokens,
//! and the verify worker stays up and within its memory. `cargo run --release -p specattn-bench --bin service -- hostile`
//! says what the neighbours' latency is meanwhile.
#![allow(clippy::unwrap_used)]

use specattn_proto::v1::FinishReason;
use specattn_tests::hostile::Hostility;
use specattn_tests::process::VERIFY;
use specattn_tests::session::open_request;
use specattn_tests::texts::references;
use specattn_tests::{Process, Session};
use tonic::transport::Channel;

/// Tokens of every session.
const TOKENS: u32 = 400;

async fn tokens(channel: &Channel, prompt: &[u32], draft_length: u32) -> Vec<u32> {
    let mut request = open_request(prompt, TOKENS);
    request.draft_length = draft_length;
    let mut session = Session::open(channel.clone(), request).await.unwrap();
    let (reason, _) = session.finish().await.unwrap();
    assert_eq!(reason, FinishReason::Length);
    session.tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_harmed() {
    let mut verify = Process::worker(VERIFY, &["--draft-timeout-ms", "50"]).await;
    // Two connections, as two hosts would have.
    let (channel, strangers) = (verify.channel().await, verify.channel().await);
    let [harassed, neighbour] = [1, 3].map(|index| references()[index].prompt.clone());
    let expected = tokens(&channel, &harassed, 0).await;
    let beside = tokens(&channel, &neighbour, 0).await;
    for hostility in Hostility::ALL {
        let request = open_request(&harassed, TOKENS);
        let mut session = Session::open(channel.clone(), request).await.unwrap();
        let (id, known) = (session.id().to_owned(), harassed.clone());
        let strangers = strangers.clone();
        let hostile = tokio::spawn(async move { hostility.harass(strangers, &id, &known).await });
        let (end, next_door) = tokio::join!(session.finish(), tokens(&channel, &neighbour, 0));
        let (reason, stats) = end.unwrap();
        assert_eq!(reason, FinishReason::Length, "{hostility:?}");
        assert_eq!(session.tokens, expected, "{hostility:?}");
        assert_eq!(next_door, beside, "{hostility:?}");
        let joined = hostile.await.unwrap();
        assert!(joined > 0, "{hostility:?} never joined");
        println!(
            "{hostility:?}: {joined} joins, {} judged, {} stale",
            stats.proposed_tokens, stats.stale_proposals
        );
        verify.is_idle().await;
    }
    assert!(verify.is_alive());
    assert!(verify.peak_memory() < 1 << 30, "{}", verify.peak_memory());
}
