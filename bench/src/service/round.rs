//! What a round costs beside compute: from a draft's last step to its next one lie its proposal's way to the verify worker,
//! that one's engine, and the verdict's way back.
//!
//! Both workers are the real ones, the verify worker a process of its own, with models that answer at once. The floors beside
//! them are made of the same parts with less around them.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use specattn_proto::v1::{Mode, OpenRequest};
use specattn_service::args::{Service, parse_from};
use specattn_tests::process::free_address;
use specattn_tests::session::open_request;
use specattn_tests::{Session, soon};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::answer_at_once::{AnswerAtOnce, CONTEXT, Pauses, Role};

/// Rounds before the clock starts.
const SKIPPED: usize = 200;

/// The subcommand under which this program is a verify worker.
pub const VERIFY_COMMAND: &str = "scripted-verify";

/// A round's shape.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Draft tokens.
    pub draft_length: u32,
    /// With masks.
    pub sparse: bool,
    /// Tokens of the prompt.
    pub prompt: usize,
}

/// Serves as a verify worker whose target answers at once.
///
/// # Errors
/// When the worker cannot go on.
pub fn verify_worker(address: SocketAddr) -> Result<()> {
    let line = ["x", "--model", "scripted", "--commit-interval-ms", "0"];
    let args: specattn_verify::Args = parse_from(Service::Verify, line)?;
    let config = args.config()?;
    args.io.runtime()?.block_on(async {
        let listener = TcpListener::bind(address).await?;
        let worker = specattn_verify::Worker::with_model(config, AnswerAtOnce::model(Role::Target));
        Ok(worker.serve(listener, CancellationToken::new()).await?)
    })
}

/// A child process that is killed when dropped.
struct Verify {
    child: Child,
    uri: String,
}

impl Verify {
    async fn start() -> Result<Self> {
        let address = free_address();
        let child = Command::new(std::env::current_exe()?)
            .args([VERIFY_COMMAND, &address])
            .stdin(Stdio::null())
            .spawn()
            .context("starting the verify worker")?;
        let verify = Self {
            child,
            uri: format!("http://{address}"),
        };
        soon("the verify worker", async {
            while specattn_service::channel::connect(&verify.uri)
                .await
                .is_err()
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Ok(verify)
    }
}

impl Drop for Verify {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a draft worker in a thread of its own, as its process would; gives where it listens.
fn draft_worker(pauses: Pauses, case: Case) -> Result<String> {
    let line = ["x", "--model", "scripted", "--lookahead", "off"];
    let args: specattn_draft::Args = parse_from(Service::Draft, line)?;
    let config = args.config()?;
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    listener.set_nonblocking(true)?;
    let uri = format!("http://{}", listener.local_addr()?);
    let model = AnswerAtOnce::model(Role::Draft(pauses));
    let runtime = args.io.runtime()?;
    ensure!(case.draft_length > 0, "a round has draft tokens");
    std::thread::spawn(move || {
        let served = runtime.block_on(async {
            let listener = TcpListener::from_std(listener)?;
            let worker = specattn_draft::Worker::with_model(config, model);
            anyhow::Ok(worker.serve(listener, CancellationToken::new()).await?)
        });
        if let Err(error) = served {
            eprintln!("the draft worker: {error:#}");
        }
    });
    Ok(uri)
}

/// Times `rounds` rounds; their overheads, in order.
///
/// # Errors
/// When a worker or the session fails.
pub async fn overheads(case: Case, rounds: usize) -> Result<Vec<Duration>> {
    let verify = Verify::start().await?;
    let pauses = Pauses::default();
    let draft = draft_worker(Arc::clone(&pauses), case)?;
    let tokens = (rounds + SKIPPED) * (case.draft_length as usize + 1);
    ensure!(case.prompt + tokens < CONTEXT, "too many rounds");
    let request = OpenRequest {
        draft_length: case.draft_length,
        mode: if case.sparse {
            Mode::Sparse
        } else {
            Mode::Dense
        }
        .into(),
        ..open_request(&vec![1; case.prompt], tokens as u32)
    };
    let channel = specattn_service::channel::connect(&verify.uri).await?;
    let session = Session::open(channel, request);
    let mut session = session.await?;
    let channel = specattn_service::channel::connect(&draft).await?;
    let attachment = session.attach(channel, &verify.uri).await?;
    session.finish().await?;
    drop(attachment);
    let pauses = std::mem::take(&mut *pauses.lock().unwrap_or_else(PoisonError::into_inner));
    ensure!(
        pauses.len() > 2 * SKIPPED,
        "too few rounds: {}",
        pauses.len()
    );
    Ok(pauses[SKIPPED..].to_vec())
}
