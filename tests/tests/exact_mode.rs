//! Exact mode, end to end: greedy text is the target's own on long prompts, whatever the masks leave out and whoever dies,
//! and what was read for it is counted right.
#![allow(clippy::unwrap_used)]

use specattn_mask::{Decoder, LayerMap, Limits, RoundMask};
use specattn_proto::v1::{CheckPolicy, FinishReason, Mode, OpenRequest, Propose, SessionStats};
use specattn_tests::count::{Count, layer_map, layer_map_file};
use specattn_tests::process::{DRAFT, VERIFY};
use specattn_tests::proxy::{Crossed, Proxy};
use specattn_tests::session::open_request;
use specattn_tests::texts::references;
use specattn_tests::{Cluster, Completion, Process, Request, Session, texts, until};

/// `request` in exact mode, with masks that keep little.
fn exact(request: Request, mask_p: f32) -> Request {
    let mut request = request.draft_length(4).sparse(mask_p).exact();
    request.0.provisional = true;
    request
}

async fn alone(cluster: &Cluster, prompt: &[u32], tokens: u32) -> Vec<u32> {
    let request = Request::tokens(prompt, tokens).draft_length(0);
    request.run(cluster.channel().await).await.unwrap().tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn greedy_text_equals_the_reference_and_the_target_alone() {
    let cluster = Cluster::start(1).await;
    let channel = cluster.channel().await;
    let mut confirmed = (0, 0);
    let mut note = |completion: &Completion| {
        confirmed.0 += completion.stats.confirmed_tokens;
        confirmed.1 += completion.stats.provisional_tokens;
    };
    for (index, reference) in references().iter().enumerate() {
        let request = Request::tokens(&reference.prompt, reference.greedy.len() as u32).exact();
        let completion = request.run(channel.clone()).await.unwrap();
        assert_eq!(completion.tokens, reference.greedy, "prompt {index}");
        note(&completion);
    }
    let prompt = texts::book(3_000);
    // Chosen online, and with masks so thin that confirmations fail all the time. The target alone comes after them: it would
    // leave the prompt to the target and not to the draft, which would be late.
    let open = Request::tokens(&prompt, 200).draft_length(4).exact();
    let thin = exact(Request::tokens(&prompt, 200), 0.05);
    let mut tokens = Vec::new();
    for request in [open, thin] {
        let completion = request.run(channel.clone()).await.unwrap();
        let stats = completion.stats;
        assert!(stats.kv_entries_read < stats.kv_entries_dense, "{stats:?}");
        assert!(
            stats.check_forwards > 0 && stats.confirmed_tokens < stats.provisional_tokens,
            "{stats:?}"
        );
        note(&completion);
        tokens.push(completion.tokens);
    }
    let expected = alone(&cluster, &prompt, 200).await;
    assert_eq!(tokens, [expected.clone(), expected]);
    println!(
        "{} of {} provisional tokens confirmed",
        confirmed.0, confirmed.1
    );
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_may_look_ahead() {
    let cluster = Cluster::start(1).await;
    let prompt = texts::book(1_000);
    let expected = alone(&cluster, &prompt, 150).await;
    let mut request = exact(Request::tokens(&prompt, 150), 0.1);
    request.0.check = Some(CheckPolicy {
        confirm_length: Some(12),
        ..CheckPolicy::default()
    });
    // The client of these tests checks that what is shown and withdrawn fits what is committed.
    let completion = request.run(cluster.channel().await).await.unwrap();
    assert_eq!(completion.tokens, expected);
    assert!(completion.looks_ahead > 0, "{completion:?}");
    assert_eq!(completion.stats.confirm_length, 12);
    // Nobody who did not ask is shown anything.
    let plain = Request::tokens(&prompt, 50).draft_length(4).exact();
    let completion = plain.run(cluster.channel().await).await.unwrap();
    assert_eq!((completion.looks_ahead, completion.withdrawals), (0, 0));
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_draft_killed_within_a_run_changes_nothing() {
    let mut cluster = Cluster::start(1).await;
    let prompt = references()[4].prompt.clone();
    let expected = alone(&cluster, &prompt, 500).await;
    let mut request = exact(Request::tokens(&prompt, 500), 0.5);
    // Runs are under way nearly all the time.
    request.0.check = Some(CheckPolicy {
        confirm_length: Some(24),
        ..CheckPolicy::default()
    });
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
    cluster.drafts.clear();
    cluster.add_draft().await;
    let completion = stream.finish().await.unwrap();
    assert_eq!(completion.tokens, expected);
    assert_eq!(completion.reason, Some(FinishReason::Length));
    cluster.is_idle().await;
}

/// Replays what crossed: every forward after the prompt. Once a run has its length the next round is dense and begins with
/// the run. The verify worker waits for its draft, so that every pass takes a round along once the draft has begun.
fn recount(crossed: &[Crossed], request: &OpenRequest, limit: usize, map: &LayerMap) -> Recount {
    let check = request.check.unwrap();
    let length = check.confirm_length.or(check.refresh_every).unwrap() as usize;
    let provisional = request.mode() == Mode::Exact;
    let mut decoder = Decoder::new(Limits::default());
    let mut last: Option<(&Propose, Option<RoundMask>)> = None;
    let mut at = Recount {
        tokens: request.token_ids.len(),
        ..Recount::default()
    };
    for event in crossed {
        match event {
            Crossed::Welcome(welcome) => at.alone(welcome.token_ids.len(), map),
            Crossed::Propose(propose) if !propose.last => {}
            Crossed::Propose(propose) => {
                let mask = decoder.decode(&propose.mask).ok().cloned();
                last = Some((propose, mask));
            }
            Crossed::Verdict(verdict) => {
                let fresh = last.take().filter(|(p, _)| p.base as usize == at.tokens);
                let gamma = fresh.as_ref().map_or(0, |(p, _)| drafted(p));
                let base = verdict.base as usize;
                match fresh {
                    Some((_, Some(mask))) if verdict.judged && at.run < length => {
                        at.count.forward(at.tokens - 1, gamma + 1, Some(&mask), map);
                        at.judged(gamma, verdict.accepted as usize);
                        at.run += verdict.accepted as usize + 1;
                    }
                    Some(_) if verdict.judged => {
                        at.check(gamma, at.run, map);
                        at.judged(gamma, verdict.accepted as usize);
                    }
                    // A round that reached the limit is not answered before its run is checked.
                    Some((_, Some(mask))) if at.run < length && at.tokens + gamma + 1 >= limit => {
                        at.last_round(gamma, limit, &mask, map);
                        at.withdrawn(0, base + verdict.next_tokens.len(), map);
                    }
                    _ if base < at.tokens => {
                        at.withdrawn(gamma, base + verdict.next_tokens.len(), map);
                    }
                    _ => at.alone(verdict.next_tokens.len(), map),
                }
            }
            Crossed::Closed => {
                let left = limit - at.tokens;
                let fresh = last.take().filter(|(p, _)| p.base as usize == at.tokens);
                match fresh {
                    Some((p, Some(mask))) if left > 1 && at.run < length => {
                        at.last_round(drafted(p), limit, &mask, map);
                        if provisional {
                            at.check(0, at.run, map);
                        }
                    }
                    Some((p, _)) if left > 1 => {
                        at.check(drafted(p).min(left - 1), at.run, map);
                        at.judged(drafted(p).min(left - 1), left - 1);
                    }
                    _ if at.run > 0 => {
                        at.check(0, at.run, map);
                        at.tokens += left;
                    }
                    _ => at.alone(left, map),
                }
            }
        }
    }
    assert_eq!(at.tokens, limit, "every token is accounted for");
    at
}

fn drafted(propose: &Propose) -> usize {
    propose.offset as usize + propose.token_ids.len()
}

#[derive(Debug, Default)]
struct Recount {
    count: Count,
    /// Tokens, and how many of them are provisional.
    tokens: usize,
    run: usize,
    checks: u64,
    provisional: u64,
    confirmed: u64,
}

impl Recount {
    fn alone(&mut self, tokens: usize, map: &LayerMap) {
        for _ in 0..tokens {
            self.count.forward(self.tokens - 1, 1, None, map);
            self.count.solo += 1;
            self.tokens += 1;
        }
    }

    fn judged(&mut self, gamma: usize, accepted: usize) {
        self.count.proposed += gamma as u64;
        self.count.accepted += accepted as u64;
        self.tokens += accepted + 1;
    }

    /// A masked round of at most `gamma` that reaches the limit.
    fn last_round(&mut self, gamma: usize, limit: usize, mask: &RoundMask, map: &LayerMap) {
        let left = limit - self.tokens;
        let gamma = gamma.min(left - 1);
        self.count
            .forward(self.tokens - 1, gamma + 1, Some(mask), map);
        self.judged(gamma, left - 1);
        self.run += left;
    }

    /// A dense pass that withdrew some of the run: `tokens` there are afterwards, the last of them recovered.
    fn withdrawn(&mut self, gamma: usize, tokens: usize, map: &LayerMap) {
        let committed = self.tokens - self.run;
        self.check(gamma, tokens - 1 - committed, map);
        self.tokens = tokens;
    }

    /// A dense pass over the run and a round of `gamma`; `confirmed` of the run stand.
    fn check(&mut self, gamma: usize, confirmed: usize, map: &LayerMap) {
        let first = self.tokens - self.run - 1;
        self.count.forward(first, 1 + self.run + gamma, None, map);
        self.checks += u64::from(self.run > 0);
        self.provisional += self.run as u64;
        self.confirmed += confirmed as u64;
        self.run = 0;
    }
}

async fn run(request: OpenRequest, tokens: u32) -> (Recount, SessionStats) {
    let (_folder, file) = layer_map_file();
    let line = ["--draft-timeout-ms", "30000", "--alignment", &file];
    let verify = Process::worker(VERIFY, &line).await;
    // One round at a time: what answers what is then plain from the messages.
    let draft = Process::worker(DRAFT, &["--lookahead", "off"]).await;
    let proxy = Proxy::start(verify.channel().await).await;
    let limit = request.token_ids.len() + tokens as usize;
    let mut session = Session::open(verify.channel().await, request.clone())
        .await
        .unwrap();
    let attachment = session
        .attach(draft.channel().await, proxy.uri())
        .await
        .unwrap();
    let (reason, stats) = session.finish().await.unwrap();
    assert_eq!(reason, FinishReason::Length);
    assert!(attachment.detached().await.contains("over"));
    (
        recount(&proxy.crossed(), &request, limit, &layer_map()),
        stats,
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_read_is_counted() {
    let prompt = texts::book(2_000);
    for (name, temperature, mask_p) in [("greedy", 0.0, 0.9), ("sampled", 0.8, 0.6)] {
        let mut request = open_request(&prompt, 200);
        request.mode = Mode::Exact.into();
        request.mask.as_mut().unwrap().mask_p = Some(mask_p);
        request.check = Some(CheckPolicy {
            confirm_length: Some(10),
            ..CheckPolicy::default()
        });
        let sampling = request.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed) = (temperature, Some(5));
        let (recount, stats) = run(request, 200).await;
        println!("{name}: {recount:?}");
        assert_eq!(Count::told(&stats), recount.count, "{name}");
        let told = (
            stats.check_forwards,
            stats.provisional_tokens,
            stats.confirmed_tokens,
        );
        let seen = (recount.checks, recount.provisional, recount.confirmed);
        assert_eq!(told, seen, "{name}");
        assert!(stats.confirmed_tokens < stats.provisional_tokens);
    }
}

/// The leash: dense passes are counted like any other, divergences stay under the bound, and p gives way.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_leash_holds_and_its_reads_are_counted() {
    let prompt = texts::book(2_000);
    for max_kl in [0.002, 0.02] {
        let mut request = open_request(&prompt, 300);
        request.mode = Mode::Sparse.into();
        request.mask.as_mut().unwrap().mask_p = Some(0.9);
        request.check = Some(CheckPolicy {
            refresh_every: Some(24),
            max_kl: Some(max_kl),
            ..CheckPolicy::default()
        });
        let sampling = request.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed) = (0.8, Some(5));
        let (recount, stats) = run(request, 300).await;
        println!("max_kl {max_kl}: {stats:?}");
        assert_eq!(Count::told(&stats), recount.count);
        assert_eq!(stats.check_forwards, recount.checks);
        assert_eq!(stats.provisional_tokens, 0);
        assert!(stats.kl_samples > 150 && stats.kl_mean > 0.0, "{stats:?}");
        assert!(stats.kl_mean < f64::from(max_kl), "{stats:?}");
        assert!(stats.kv_entries_read < stats.kv_entries_dense);
    }
}
