//! The scheduler on a real model: a session's tokens are its own whatever else runs, whatever of its prompt others have
//! processed, and however often its KV blocks are taken away.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use specattn_engine::{CHUNK_TOKENS, LoadOptions, LogitRows, Model, Sequence, Step, StepOutput};
use specattn_proto::Fault;
use specattn_worker::scheduler::{Exit, Limits, Plan, Scheduler, Session, Stepped};
use specattn_worker::{LoadGauge, Patience, Readiness};

/// Decodes greedily from a prompt.
struct Greedy {
    name: usize,
    tokens: Vec<u32>,
    prompt: usize,
    limit: usize,
    cached: usize,
    input: Vec<u32>,
    readiness: Readiness,
    /// How long it takes to settle, and to prepare where that is needed at all.
    takes: Duration,
    prepared: bool,
    /// The threads on which sessions did that took long.
    threads: Arc<Mutex<HashSet<ThreadId>>>,
}

impl Greedy {
    fn new(name: usize, prompt: &[u32], more: usize) -> Self {
        Self {
            name,
            tokens: prompt.to_vec(),
            prompt: prompt.len(),
            limit: prompt.len() + more,
            cached: 0,
            input: Vec::new(),
            readiness: Readiness::Alone,
            takes: Duration::ZERO,
            prepared: false,
            threads: Arc::default(),
        }
    }

    fn dawdle(&self) {
        if !self.takes.is_zero() {
            thread::sleep(self.takes);
            self.threads.lock().unwrap().insert(thread::current().id());
        }
    }
}

impl Session for Greedy {
    type Ending = ();

    fn is_abandoned(&self) -> bool {
        false
    }
    fn reach(&self) -> usize {
        self.tokens.len() + 1
    }
    fn is_prefilling(&self) -> bool {
        self.cached + 1 < self.tokens.len()
    }
    fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt - 1]
    }
    fn cached(&self) -> usize {
        self.cached
    }
    fn set_cached(&mut self, cached: usize) {
        self.cached = cached;
    }
    fn readiness(&self, _now: Instant) -> Readiness {
        self.readiness
    }
    fn has_arrivals(&self) -> bool {
        !self.takes.is_zero() && !self.prepared
    }
    fn prepare(&mut self) {
        self.dawdle();
        self.prepared = true;
    }
    fn plan(&mut self, _now: Instant) -> Plan {
        assert!(self.is_prefilling() || !self.has_arrivals());
        if self.readiness == Readiness::Expected {
            return Plan::Wait(None);
        }
        let mut end = self.tokens.len();
        if self.is_prefilling() {
            end = (end - 1).min((self.cached / CHUNK_TOKENS + 1) * CHUNK_TOKENS);
            if self.cached < self.prompt - 1 {
                end = end.min(self.prompt - 1);
            }
        }
        self.input = self.tokens[self.cached..end].to_vec();
        Plan::Run
    }
    fn step<'a>(&'a self, sequence: &'a mut Sequence) -> Step<'a> {
        let logits = match self.is_prefilling() {
            true if self.cached < self.prompt - 1 => LogitRows::None,
            true => LogitRows::Replay,
            false => LogitRows::Verify,
        };
        Step {
            logits,
            argmax: true,
            ..Step::new(sequence, &self.input)
        }
    }
    fn settle(&mut self, output: &StepOutput) -> Result<Option<()>, Fault> {
        self.dawdle();
        self.prepared = false;
        self.cached += self.input.len();
        self.tokens.extend(output.argmax.iter().flatten());
        Ok((self.tokens.len() == self.limit).then_some(()))
    }
}

fn scheduler(kv_blocks: usize, batch_tokens: usize) -> (Scheduler<Greedy>, Arc<LoadGauge>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/draft");
    let block_bytes = 3 * 64 * 2 * 64 * 4;
    let options = LoadOptions {
        kv_cache_bytes: kv_blocks * block_bytes,
        threads: 2,
        ..LoadOptions::default()
    };
    let model = Model::load(&folder, &options, &mut |_, _| {}).unwrap();
    assert_eq!(model.kv_blocks(), (0, kv_blocks));
    let load = Arc::new(LoadGauge::new(model.block_pool(), 64));
    let limits = Limits {
        batch_tokens,
        prefill_share: 0.5,
        share_prefixes: true,
        gather: Patience::Drafts,
        forward_delay: Duration::ZERO,
    };
    (Scheduler::new(model, Arc::clone(&load), limits), load)
}

/// Filler text.
fn text(len: usize, seed: u32) -> Vec<u32> {
    let token = |i: usize| (i as u32 * 7_919 + seed * 104_729 + 13) % 8_192;
    (0..len).map(token).collect()
}

/// Opens the sessions and runs them to their ends; their tokens, in order of their names.
fn run(scheduler: &mut Scheduler<Greedy>, sessions: Vec<Greedy>) -> Vec<Vec<u32>> {
    let mut texts = vec![Vec::new(); sessions.len()];
    let mut left = sessions.len();
    for session in sessions {
        let room = session.limit + 1;
        scheduler.open(session, room).unwrap();
    }
    while left > 0 {
        let Stepped::Ran(gone) = scheduler.step() else {
            panic!("nobody waits here");
        };
        for (session, exit) in gone {
            assert!(matches!(exit, Exit::Ended(())), "{exit:?}");
            left -= 1;
            texts[session.name] = session.tokens;
        }
    }
    texts
}

#[test]
fn a_ready_session_waits_for_one_that_is_expected_but_not_for_ever() {
    let (mut scheduler, _) = scheduler(64, 64);
    for (name, readiness) in [Readiness::Ready, Readiness::Expected]
        .into_iter()
        .enumerate()
    {
        let mut session = Greedy::new(name, &text(20, 1), 8);
        session.readiness = readiness;
        scheduler.open(session, 64).unwrap();
    }
    let (mut forwards, mut waits) = (0, 0);
    let ended = loop {
        match scheduler.step() {
            Stepped::Ran(gone) if gone.is_empty() => forwards += 1,
            Stepped::Ran(gone) => break gone,
            Stepped::Idle(until) => {
                // The expected one never comes: it is given up, not waited for without an end.
                let until =
                    until.expect("a ready session is never left without a time to look again");
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                waits += 1;
            }
        }
    };
    assert_eq!(ended[0].0.name, 0);
    // The prompts, then eight tokens; all but the first, whose time nobody knows, were waited for.
    assert!(
        forwards >= 7 && waits >= 7,
        "{forwards} forwards, {waits} waits"
    );
}

/// Sessions of all lengths, some of which begin alike.
fn company() -> Vec<Greedy> {
    let shared = text(700, 1);
    (0..12)
        .map(|name| {
            let prompt = match name % 3 {
                0 => [&shared[..], &text(40 + 31 * name, 2 + name as u32)].concat(),
                1 => text(2 + 17 * name, 50 + name as u32),
                _ => shared[..300 + 20 * name].to_vec(),
            };
            Greedy::new(name, &prompt, 24 + 9 * name)
        })
        .collect()
}

/// Each session on its own, with nothing cached.
fn alone() -> Vec<Vec<u32>> {
    let texts = company().into_iter().map(|mut session| {
        session.name = 0;
        let (mut scheduler, _) = scheduler(64, 512);
        run(&mut scheduler, vec![session]).remove(0)
    });
    texts.collect()
}

#[test]
fn tokens_are_the_same_alone_batched_cached_and_preempted() {
    let alone = alone();
    // Room for all, in batches of all and of a few.
    for batch_tokens in [512, 3] {
        let (mut ample, load) = scheduler(400, batch_tokens);
        assert_eq!(run(&mut ample, company()), alone);
        let report = load.report(false);
        assert_eq!((report.kv_blocks_used, report.preemptions_total), (0, 0));
        // The first 512 tokens of eight sessions are processed once, whoever comes to them.
        assert!(report.prefix_tokens_total >= 7 * 256, "{report:?}");
        // Again, with every shared chunk there from the beginning.
        let before = report.tokens_total;
        assert_eq!(run(&mut ample, company()), alone);
        let report = load.report(false);
        assert!(report.tokens_total - before < before, "{report:?}");
        assert!(report.kv_blocks_cached > 0);
    }
    // Hardly room for the longest: they go one after another, and shared chunks have to give way.
    let (mut scarce, load) = scheduler(26, 512);
    assert_eq!(run(&mut scarce, company()), alone);
    let report = load.report(false);
    assert_eq!(report.kv_blocks_used, 0);
    assert!(report.kv_blocks_evicted_total > 0, "{report:?}");
}

#[test]
fn sessions_that_take_long_work_at_the_same_time_and_come_to_the_same_tokens() {
    let threads = Arc::new(Mutex::new(HashSet::new()));
    let sessions = |takes| {
        let session = |name| Greedy {
            takes,
            threads: Arc::clone(&threads),
            ..Greedy::new(name, &text(20 + name, name as u32), 10 + name)
        };
        (0..6).map(session).collect::<Vec<_>>()
    };
    let (mut quick, _) = scheduler(100, 512);
    let texts = run(&mut quick, sessions(Duration::ZERO));
    assert_eq!(threads.lock().unwrap().len(), 0);
    let (mut slow, _) = scheduler(100, 512);
    assert_eq!(run(&mut slow, sessions(Duration::from_millis(2))), texts);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    assert_eq!(threads.lock().unwrap().len(), cores.min(2));
}

#[test]
fn one_prompt_is_processed_once() {
    for length in [60, 512, 513, 600] {
        let on_it = |name| Greedy::new(name, &text(length, 4), 20);
        let (mut first, _) = scheduler(100, 512);
        let alone = run(&mut first, vec![on_it(0)]);
        let (mut scheduler, load) = scheduler(100, 512);
        assert_eq!(
            run(&mut scheduler, (0..5).map(on_it).collect()),
            vec![alone[0].clone(); 5]
        );
        let report = load.report(false);
        assert_eq!(
            report.tokens_total as usize,
            length - 1 + 5 * 20,
            "{report:?}"
        );
        assert_eq!(report.kv_blocks_used, 0);
        // Whoever comes later, and differs in nothing but the last token.
        let mut other = text(length, 4);
        other[length - 1] += 1;
        run(&mut scheduler, vec![Greedy::new(0, &other, 20)]);
        let later = load.report(false);
        assert_eq!(later.tokens_total - report.tokens_total, 20);
    }
}

#[test]
fn sessions_that_outgrow_the_cache_give_way_and_finish_all_the_same() {
    let growing = || -> Vec<Greedy> {
        let session = |name| Greedy::new(name, &text(300 * (name % 2) + 20, name as u32), 400);
        (0..6).map(session).collect()
    };
    let (mut ample, load) = scheduler(100, 512);
    let texts = run(&mut ample, growing());
    assert_eq!(load.report(false).preemptions_total, 0);
    let (mut scarce, load) = scheduler(18, 512);
    assert_eq!(run(&mut scarce, growing()), texts);
    let report = load.report(false);
    assert_eq!(report.kv_blocks_used, 0);
    assert!((1..50).contains(&report.preemptions_total), "{report:?}");
}

#[test]
fn what_the_whole_cache_could_not_hold_is_refused() {
    let (mut scheduler, load) = scheduler(4, 512);
    let refused = scheduler.open(Greedy::new(0, &text(200, 0), 80), 281);
    assert_eq!(refused.unwrap_err().label(), "resource_exhausted");
    let too_long = scheduler.open(Greedy::new(0, &text(9, 0), 80), 10_000);
    assert_eq!(too_long.unwrap_err().label(), "invalid_argument");
    assert_eq!(load.report(false).sessions_active, 0);
    run(&mut scheduler, vec![Greedy::new(0, &text(200, 0), 50)]);
}

#[test]
fn a_session_that_is_removed_leaves_nothing() {
    let (mut scheduler, load) = scheduler(64, 512);
    for name in 0..3 {
        let session = Greedy::new(name, &text(600, 3), 50);
        scheduler.open(session, 651).unwrap();
    }
    for _ in 0..9 {
        scheduler.step();
    }
    assert!(load.report(false).kv_blocks_used > 0);
    for name in [1, 0, 2] {
        assert!(scheduler.remove(|s| s.name == name).is_some());
        assert!(scheduler.remove(|s| s.name == name).is_none());
    }
    let report = load.report(false);
    assert_eq!((report.kv_blocks_used, report.sessions_active), (0, 0));
    assert!(matches!(scheduler.step(), Stepped::Idle(None)));
}
