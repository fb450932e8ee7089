//! With the target's memory on no message tells what was read: sessions are run again from outside, and what that reads
//! is what they say of themselves; what they measured of their divergence is what a full dense pass finds.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use specattn_mask::LayerMap;
use specattn_proto::v1::{CheckPolicy, FinishReason, Mode, OpenRequest, SessionStats};
use specattn_tests::count::Count;
use specattn_tests::process::{self, DRAFT, VERIFY};
use specattn_tests::proxy::Proxy;
use specattn_tests::replay::Replay;
use specattn_tests::session::open_request;
use specattn_tests::{Process, Session, texts};

/// A pair of workers with the bundled map.
struct Workers {
    verify: Process,
    draft: Process,
}

impl Workers {
    async fn start() -> Self {
        let patient = ["--draft-timeout-ms", "30000"];
        Self {
            verify: Process::worker(VERIFY, &patient).await,
            // One round at a time: what follows what is then plain from the messages.
            draft: Process::worker(DRAFT, &["--lookahead", "off"]).await,
        }
    }

    /// Runs a session, and runs it again from outside.
    async fn run(&self, request: &OpenRequest) -> (SessionStats, Replay) {
        let proxy = Proxy::start(self.verify.channel().await).await;
        let mut session = Session::open(self.verify.channel().await, request.clone())
            .await
            .unwrap();
        let attachment = session
            .attach(self.draft.channel().await, proxy.uri())
            .await
            .unwrap();
        let (reason, stats) = session.finish().await.unwrap();
        assert_eq!(reason, FinishReason::Length);
        assert!(attachment.detached().await.contains("over"));
        let committed = [&request.token_ids[..], &session.tokens].concat();
        let map = LayerMap::load(&process::target().join("alignment.json")).unwrap();
        assert!(map.memory.is_some(), "the bundled map has a memory");
        let replay = Replay::of(&proxy.crossed(), request, &committed, map);
        (stats, replay)
    }
}

fn request(prompt: &[u32], tokens: u32, temperature: f32) -> OpenRequest {
    let mut request = open_request(prompt, tokens);
    request.mode = Mode::Sparse.into();
    request.mask.as_mut().unwrap().mask_p = Some(0.9);
    let sampling = request.sampling.as_mut().unwrap();
    (sampling.temperature, sampling.seed) = (temperature, Some(5));
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn reads_by_memory_are_counted_right() {
    let prompt = texts::book(2_000);
    let workers = Workers::start().await;
    for temperature in [0.0, 0.8] {
        let (stats, replay) = workers.run(&request(&prompt, 200, temperature)).await;
        println!("at {temperature}: {:?}", replay.count);
        assert_eq!(Count::told(&stats), replay.count, "at {temperature}");
        assert!(replay.count.read < replay.count.dense);
    }
}

/// A session on a leash of `max_kl` from a prompt of the text; its stats, and its divergences by a full dense pass.
async fn leashed(workers: &Workers, prompt: &[u32], max_kl: f32) -> (SessionStats, Vec<f64>) {
    let mut request = request(prompt, 500, 0.8);
    request.check = Some(CheckPolicy {
        refresh_every: Some(64),
        max_kl: Some(max_kl),
        ..CheckPolicy::default()
    });
    let (stats, mut replay) = workers.run(&request).await;
    assert_eq!(Count::told(&stats), replay.count);
    (stats, replay.divergences())
}

fn mean(divergences: &[f64]) -> f64 {
    divergences.iter().sum::<f64>() / divergences.len() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_leash_tells_what_a_dense_pass_finds() {
    let workers = Workers::start().await;
    let (stats, divergences) = leashed(&workers, &texts::book(1_500), 0.01).await;
    let samples = stats.kl_samples as usize;
    println!(
        "{} masked tokens, {samples} measured: {} told",
        divergences.len(),
        stats.kl_mean
    );
    assert!(mean(&divergences) < 0.01, "{}", mean(&divergences));
    // The worker measures all but what follows its last dense pass.
    assert!(samples > 200 && divergences.len() - samples < 100);
    let measured = mean(&divergences[..samples]);
    assert!(
        (measured / stats.kl_mean - 1.0).abs() < 0.05,
        "{measured} is not {}",
        stats.kl_mean
    );
}

/// Prints a table for bench/quality: `cargo test --release -p specattn-tests --test replayed -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "minutes of measuring, on books that are not part of the tree"]
async fn the_leash_holds_on_every_book() {
    let workers = Workers::start().await;
    let books = texts::book_files();
    let name = |path: &PathBuf| path.file_stem().unwrap().to_string_lossy().into_owned();
    println!("| context | book | bound | KL by a dense pass | told by the session | KV kept |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut broken = Vec::new();
    let all = books.iter().map(|book| (4_096, book));
    for (context, book) in all.chain(books.iter().take(2).map(|book| (8_192, book))) {
        for max_kl in [0.006, 0.02] {
            let prompt = texts::middle_of(book, context - 500);
            let (stats, divergences) = leashed(&workers, &prompt, max_kl).await;
            let found = mean(&divergences);
            println!(
                "| {context} | {} | {max_kl} | {found:.4} | {:.4} | {:.1} % |",
                name(book),
                stats.kl_mean,
                100.0 * stats.kv_entries_read as f64 / stats.kv_entries_dense as f64,
            );
            if found > f64::from(max_kl) {
                broken.push((context, name(book), max_kl, found));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:?}");
}
