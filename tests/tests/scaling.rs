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

/// The share of an even one that each worker had, of one setting.
type Shares = (String, Vec<f64>);

/// How work is spread over `drafts` draft workers and over `verifies` verify workers.
async fn spread(cluster: &Cluster, load: &Load, drafts: usize, verifies: usize) -> Vec<Shares> {
    let mut found = Vec::new();
    load.serve(SETTLING).await;
    let roles = [(WorkerRole::Draft, drafts), (WorkerRole::Verify, verifies)];
    let before = [
        work(cluster, roles[0].0).await,
        work(cluster, roles[1].0).await,
    ];
    load.serve(COMPARED).await;
    for ((role, count), before) in roles.into_iter().zip(before) {
        let after = work(cluster, role).await;
        let done: Vec<u64> = after
            .iter()
            .map(|(worker, done)| done - before[worker])
            .collect();
        assert_eq!(done.len(), count);
        let even = done.iter().sum::<u64>() as f64 / count as f64;
        let shares: Vec<f64> = done.iter().map(|&done| done as f64 / even).collect();
        let setting = format!("{drafts} draft, {verifies} verify workers: {role:?}");
        println!("{setting} {shares:.3?} of an even share");
        found.push((setting, shares));
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
async fn join_and_drain() -> Vec<Shares> {
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
async fn work_follows_workers_that_join_and_leaves_those_that_drain() {
    assert_eq!(join_and_drain().await.len(), 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[ignore = "ten processes want more than two cores: there a draft that is slow to answer gets too little now and then"]
async fn work_spreads_evenly() {
    for (setting, shares) in join_and_drain().await {
        let is_even = shares.iter().all(|share| (share - 1.0).abs() <= UNEVEN);
        assert!(is_even, "{setting}: {shares:?}");
    }
}
