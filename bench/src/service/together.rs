//! Many sessions of a target and a draft that share a device: do their rounds come together, and what do messages add to the forwards?
//!
//! Both workers are the real ones; the device is a lock that each forward holds for as long as a forward takes, however many sessions it
//! has. A round can be no shorter than a forward of the target and as many of the draft as it has tokens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use specattn_engine::{Model, Script, ScriptedShape, Step, StepOutput};
use specattn_proto::v1::{Mode, OpenRequest};
use specattn_service::args::{Service, parse_from};
use specattn_tests::Session;
use specattn_tests::session::open_request;
use specattn_worker::Patience;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::answer_at_once::{CONTEXT, VOCAB, answer};

/// A forward of so many tokens a session is a prompt's, and takes no time here.
const PROMPT_TOKENS: usize = 32;
/// Time for all sessions to be under way.
const WARM_UP: Duration = Duration::from_millis(1_500);
/// Time that is looked at.
const WINDOW: Duration = Duration::from_secs(2);

/// The load.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Sessions at a time.
    pub sessions: usize,
    /// Draft tokens per round.
    pub draft_length: u32,
    /// What a forward of the target takes, and one of the draft.
    pub forwards: (Duration, Duration),
    /// Whether drafts wait for verdicts that are on their way.
    pub gather: bool,
}

/// What it came to.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Time of a session's round, in ms.
    pub round_ms: f64,
    /// Sessions in a forward of the target.
    pub sessions: f64,
    /// Forwards of the draft for one of the target.
    pub draft_forwards: f64,
}

/// Forwards, and the sessions in them, so far.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    forwards: usize,
    sessions: usize,
}

/// A model on the shared device.
struct OnDevice {
    device: Arc<Mutex<()>>,
    forward: Duration,
    count: Arc<Mutex<Count>>,
}

impl OnDevice {
    fn model(self) -> Model {
        let shape = ScriptedShape {
            vocab_size: VOCAB,
            max_context: CONTEXT,
            kv_blocks: CONTEXT,
        };
        Model::scripted(&shape, Box::new(self))
    }
}

impl Script for OnDevice {
    fn answer(&mut self, steps: &[Step<'_>]) -> Vec<StepOutput> {
        if steps.iter().all(|step| step.tokens.len() < PROMPT_TOKENS) {
            let device = self.device.lock().unwrap_or_else(PoisonError::into_inner);
            std::thread::sleep(self.forward);
            drop(device);
            let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            count.forwards += 1;
            count.sessions += steps.len();
        }
        steps.iter().map(answer).collect()
    }
}

/// Runs sessions whose drafts are always right, and looks at them for a while.
///
/// # Errors
/// When a worker or a session fails.
pub async fn run(case: Case) -> Result<Figures> {
    let (device, counts) = (Arc::default(), [Arc::default(), Arc::default()]);
    let on_device = |forward, count: &Arc<Mutex<Count>>| OnDevice {
        device: Arc::clone(&device),
        forward,
        count: Arc::clone(count),
    };
    let models = [
        on_device(case.forwards.0, &counts[0]).model(),
        on_device(case.forwards.1, &counts[1]).model(),
    ];
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let [verify, draft] = serve(models, case.gather, &stop).await?;
    let mut sessions = JoinSet::new();
    for _ in 0..case.sessions {
        sessions.spawn(session(case.draft_length, verify.clone(), draft.clone()));
    }
    tokio::time::sleep(WARM_UP).await;
    let read = || {
        counts
            .each_ref()
            .map(|count| *count.lock().unwrap_or_else(PoisonError::into_inner))
    };
    let (before, begin) = (read(), Instant::now());
    tokio::time::sleep(WINDOW).await;
    let (after, took) = (read(), begin.elapsed());
    ensure!(sessions.try_join_next().is_none(), "a session ended early");
    let forwards = (after[0].forwards - before[0].forwards) as f64;
    let rounds = (after[0].sessions - before[0].sessions) as f64;
    Ok(Figures {
        round_ms: took.as_secs_f64() * 1e3 * case.sessions as f64 / rounds,
        sessions: rounds / forwards,
        draft_forwards: (after[1].forwards - before[1].forwards) as f64 / forwards,
    })
}

/// Serves target and draft; their addresses.
async fn serve(models: [Model; 2], gather: bool, stop: &CancellationToken) -> Result<[String; 2]> {
    let [target, draft] = models;
    let listeners = [
        TcpListener::bind("127.0.0.1:0").await?,
        TcpListener::bind("127.0.0.1:0").await?,
    ];
    let addresses = [listeners[0].local_addr()?, listeners[1].local_addr()?];
    let [to_verify, to_draft] = listeners;
    let line = ["x", "--model", "scripted", "--draft-shares-device"];
    let args: specattn_verify::Args = parse_from(Service::Verify, line)?;
    let worker = specattn_verify::Worker::with_model(args.config()?, target);
    tokio::spawn(worker.serve(to_verify, stop.clone()));
    let line = ["x", "--model", "scripted", "--lookahead", "off"];
    let args: specattn_draft::Args = parse_from(Service::Draft, line)?;
    let mut config = args.config()?;
    if gather {
        config.model.limits.gather = Patience::Verdicts;
    }
    let worker = specattn_draft::Worker::with_model(config, draft);
    tokio::spawn(worker.serve(to_draft, stop.clone()));
    Ok(addresses.map(|address| format!("http://{address}")))
}

/// A session that is longer than anybody looks.
async fn session(draft_length: u32, verify: String, draft: String) -> Result<()> {
    let request = OpenRequest {
        draft_length,
        mode: Mode::Sparse.into(),
        ..open_request(&[1; 200], 1 << 15)
    };
    let channel = specattn_service::channel::connect(&verify).await?;
    let mut session = Session::open(channel, request).await?;
    let channel = specattn_service::channel::connect(&draft).await?;
    let attachment = session.attach(channel, &verify).await?;
    session.finish().await?;
    drop(attachment);
    Ok(())
}
