//! Nothing that an honest draft does, however its rounds and the target's steps fall in time, makes the verify worker send it
//! away.
#![allow(clippy::unwrap_used)]

use specattn_proto::v1::Sampling;
use specattn_tests::cluster::gateway_at;
use specattn_tests::metrics::Page;
use specattn_tests::process::{self, DRAFT, Process, VERIFY};
use specattn_tests::{Cluster, Request, texts};

/// Seeds of each mode.
const SEEDS: u64 = 2;

#[tokio::test]
async fn honest_drafts_stay() {
    let gateway = gateway_at(&process::free_address(), &[]).await;
    let home = ["--gateway", gateway.uri(), "--no-prefix-sharing"];
    let verify = Process::worker(VERIFY, &home).await;
    // Captured steps lie so far apart that most rounds have no rows of their own, and what is sent ahead verdicts void.
    let flags = ["--capture-every", "8", "--lookahead", "on"];
    let draft = Process::worker(DRAFT, &[home.as_slice(), &flags].concat()).await;
    let cluster = Cluster::of(gateway, verify, vec![draft]).await;
    let channel = cluster.channel().await;
    let prompt = texts::book(600);
    for seed in 1..=SEEDS {
        let mut request = Request::tokens(&prompt, 64).draft_length(2);
        request.0.sampling = Some(Sampling {
            temperature: 0.8,
            seed: Some(seed),
            ..Sampling::default()
        });
        for request in [
            request.clone(),
            request.clone().exact(),
            request.sparse(0.9),
        ] {
            let completion = request.run(channel.clone()).await.unwrap();
            assert_eq!(completion.tokens.len(), 64);
            assert!(completion.stats.proposed_tokens > 0);
        }
    }
    let verify = Page::of(&cluster.verify).await;
    assert_eq!(verify.value("verify_drafts_let_go_total"), 0.0);
}
