//! Two minutes of chaos. `cargo run --release -p specattn-tests --bin chaos` endures more, with other seeds.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use specattn_tests::chaos::{Options, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_in_two_minutes_of_chaos() {
    let options = Options {
        seed: 1,
        duration: Duration::from_secs(120),
        clients: 6,
    };
    let verdict = run(options).await;
    println!("{verdict}");
    verdict.check().unwrap();
    assert!(verdict.account.finished > 10, "{:?}", verdict.account);
}
