//! Work spreads over workers, follows those that join, and leaves those that drain with nothing cut.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use specattn_proto::v1::WorkerRole;
use specattn_tests::process::{DRAFT, VERIFY};
use specattn_tests::texts::references;
use specattn_tests::{Cluster, Process, Request};
use tokio::task::JoinSet;

/// Clients, each with one session after another.
const CLIENTS: usize = 16;

/// Tokens of a session.
const TOKENS: u32 = 24;

/// Sessions over which work is compared, and those before it: what was begun elsewhere is over by then.
const COMPARED: u64 = 160;
const SETTLING: u64 = 32;

/// How far from even a worker's share may be.
const UNEVEN: f64 = 0.15;

/// Within this a worker that joins has work.
const TAKEN_UP: Duration = Duration::from_secs(5);

/// Sessions without a pause, all of them checked.
struct Load {
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    clients: JoinSet<()>,
}

impl Load {
    async fn start(cluster: &Cluster) -> Self {
        let prompt = references()[2].prompt.clone();
        let request = move |length| Request::tokens(&prompt, TOKENS).draft_length(length);
        let alone = request(0).run(cluster.channel().await).await.unwrap();
        let (stop, served) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            let (request, expected) = (request.clone(), alone.tokens.clone());
            let channel = cluster.channel().await;
            clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let completion = request(4).run(channel.clone()).await.unwrap();
                    assert_eq!(completion.tokens, expected, "nothing cut, nothing wrong");
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        Self {
            stop,
            served,
            clients,
        }
    }

    /// Adds up, at short intervals, the sessions that each worker holds, until so many more were served.
    async fn watch(&self, cluster: &Cluster, sessions: u64) -> BTreeMap<String, u64> {
        let until = self.served.load(Ordering::Relaxed) + sessions;
        let mut held = BTreeMap::new();
        while self.served.load(Ordering::Relaxed) < until {
            for worker in cluster.status().await.workers {
                *held.entry(worker.endpoint).or_default() += u64::from(worker.sessions_assigned);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        held
    }

    /// Waits until so many more sessions were served.
    async fn serve(&self, sessions: u64) {
        let until = self.served.load(Ordering::Relaxed) + sessions;
        while self.served.load(Ordering::Relaxed) < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        self.served.load(Ordering::Relaxed)
    }
}

/// Tokens that each worker of `role` has processed so far.
async fn work(cluster: &Cluster, role: WorkerRole) -> BTreeMap<String, u64> {
    let workers = cluster.status().await.workers.into_iter();
    let of_role = workers.filter(|worker| worker.role() == role);
    of_role
        .map(|worker| (worker.endpoint, worker.load.unwrap().tokens_total))
        .collect()
}

/// How one setting's work was spread over the workers of a role: the share of an even one that each had.
struct Spread {
    setting: String,
    /// Of the sessions held, averaged over time: what the gateway decides.
    sessions: Vec<f64>,
    /// Of the tokens processed: what comes of it on this machine.
    tokens: Vec<f64>,
}

/// Each value's share of an even one.
fn shares(values: &[u64]) -> Vec<f64> {
    let even = values.iter().sum::<u64>() as f64 / values.len() as f64;
    values.iter().map(|&value| value as f64 / even).collect()
}

fn is_even(shares: &[f64]) -> bool {
    shares.iter().all(|share| (share - 1.0).abs() <= UNEVEN)
}

/// How work is spread over `drafts` draft workers and over `verifies` verify workers.
async fn spread(cluster: &Cluster, load: &Load, drafts: usize, verifies: usize) -> Vec<Spread> {
    let mut found = Vec::new();
    load.serve(SETTLING).await;
    let roles = [(WorkerRole::Draft, drafts), (WorkerRole::Verify, verifies)];
    let before = [
        work(cluster, roles[0].0).await,
        work(cluster, roles[1].0).await,
    ];
    let held = load.watch(cluster, COMPARED).await;
    for ((role, count), before) in roles.into_iter().zip(before) {
        let after = work(cluster, role).await;
        assert_eq!(after.len(), count);
        let done = after.iter().map(|(worker, done)| done - before[worker]);
        let spread = Spread {
            setting: format!("{drafts} draft, {verifies} verify workers: {role:?}"),
            sessions: shares(&Vec::from_iter(after.keys().map(|worker| held[worker]))),
            tokens: shares(&Vec::from_iter(done)),
        };
        println!(
            "{} {:.3?} of an even share of sessions, {:.3?} of tokens",
            spread.setting, spread.sessions, spread.tokens
        );
        found.push(spread);
    }
    found
}

/// Starts a worker and waits until it has done some work.
async fn joins(cluster: &Cluster, name: &str) -> Process {
    let worker = Process::worker(name, &["--gateway", cluster.gateway.uri()]).await;
    let began = Instant::now();
    loop {
        let workers = cluster.status().await.workers;
        let known = workers.iter().find(|known| known.endpoint == worker.uri());
        let done = known
            .and_then(|known| known.load)
            .map_or(0, |load| load.tokens_total);
        if done > 0 {
            println!("{name} had work {:?} after it answered", began.elapsed());
            return worker;
        }
        let assigned: Vec<_> = workers
            .iter()
            .map(|w| (&w.worker_id, w.sessions_assigned))
            .collect();
        assert!(
            began.elapsed() < TAKEN_UP,
            "no work for {}: {assigned:?}",
            worker.uri()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Drains a worker: it ends well.
async fn drains(mut worker: Process) {
    worker.signal("TERM");
    assert_eq!(worker.ended().await, Some(0));
}

/// Workers join and drain under load, each session of which is checked; how work was spread meanwhile.
async fn join_and_drain() -> Vec<Spread> {
    let mut found = Vec::new();
    let mut cluster = Cluster::start(1).await;
    let load = Load::start(&cluster).await;
    for drafts in [2, 4] {
        while cluster.drafts.len() < drafts {
            let draft = joins(&cluster, DRAFT).await;
            cluster.drafts.push(draft);
        }
        found.extend(spread(&cluster, &load, drafts, 1).await);
    }
    let second = joins(&cluster, VERIFY).await;
    for drafts in [4, 2, 1] {
        while cluster.drafts.len() > drafts {
            drains(cluster.drafts.remove(0)).await;
        }
        cluster.knows(WorkerRole::Draft, drafts).await;
        found.extend(spread(&cluster, &load, drafts, 2).await);
    }
    drains(second).await;
    cluster.knows(WorkerRole::Verify, 1).await;
    load.serve(SETTLING).await;
    println!("{} sessions in all", load.finish().await);
    cluster.is_idle().await;
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sessions_follow_workers_that_join_and_leave_those_that_drain() {
    let found = join_and_drain().await;
    assert_eq!(found.len(), 10);
    for spread in found {
        let Spread {
            setting, sessions, ..
        } = spread;
        assert!(is_even(&sessions), "{setting}: {sessions:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "ten processes on two cores: whatever else runs there decides, too, how much work is done in even shares of sessions"]
async fn work_spreads_evenly() {
    for spread in join_and_drain().await {
        let Spread {
            setting, tokens, ..
        } = spread;
        assert!(is_even(&tokens), "{setting}: {tokens:?}");
    }
}
