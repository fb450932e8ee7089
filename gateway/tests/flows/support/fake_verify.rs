//! A verify worker that commits a script.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::verify_service_server::{VerifyService, VerifyServiceServer};
use specattn_proto::v1::{
    CloseRequest, CloseResponse, Committed, FinishReason, InspectRequest, InspectResponse,
    ModelInfo, OpenRequest, OpenResponse, Opened, Provisional, RolledBack, SessionFinished,
    SessionStats, SpeculateRequest, SpeculateResponse, TokenLogprobs, TokenOrigin,
    VerifyStatusRequest, VerifyStatusResponse, WorkerLoad, WorkerRole,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::guard::Access;
use specattn_service::server::Server;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Running, model, serve_worker};

/// What the worker commits, whatever it is asked.
#[derive(Clone)]
pub(crate) struct Script {
    /// Committed over and over until the session's limit.
    pub(crate) tokens: Vec<u32>,
    /// Tokens per Committed event.
    pub(crate) block: usize,
    /// Pause before each event.
    pub(crate) pace: Duration,
    /// Refuses Open like this.
    pub(crate) refuse: Option<Fault>,
    /// Takes no heed of Close.
    pub(crate) deaf: bool,
    /// Commits with this start instead of the right one.
    pub(crate) wrong_start: Option<u64>,
    /// Hangs up once the session has so many tokens of completion.
    pub(crate) hangs_up_at: Option<usize>,
    /// Commits again what it committed last, with so much added to each token.
    pub(crate) repeats: Option<u32>,
    /// Shows the tokens of each event, and one too many, before it commits them.
    pub(crate) looks_ahead: bool,
    /// What it says it runs.
    pub(crate) model: ModelInfo,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            tokens: (100..200).collect(),
            block: 3,
            pace: Duration::from_millis(1),
            refuse: None,
            deaf: false,
            wrong_start: None,
            hangs_up_at: None,
            repeats: None,
            looks_ahead: false,
            model: model(),
        }
    }
}

type Closers = Mutex<HashMap<String, watch::Sender<Option<FinishReason>>>>;

/// The worker; a clone tells what happened.
#[derive(Clone)]
pub(crate) struct FakeVerify {
    script: Arc<Script>,
    closers: Arc<Closers>,
    opened: Arc<Mutex<Vec<OpenRequest>>>,
}

impl FakeVerify {
    pub(crate) fn new(script: Script) -> Self {
        Self {
            script: Arc::new(script),
            closers: Arc::default(),
            opened: Arc::default(),
        }
    }

    pub(crate) async fn start(&self, gateway: Option<&str>) -> Running {
        let service = VerifyServiceServer::new(self.clone());
        let server = Server::new().with(service, Access::Everyone);
        serve_worker(
            server,
            WorkerRole::Verify,
            self.script.model.clone(),
            gateway,
        )
        .await
    }

    /// Sessions that run now.
    pub(crate) fn running(&self) -> usize {
        self.closers.lock().unwrap().len()
    }

    /// Every Open that came.
    pub(crate) fn opened(&self) -> Vec<OpenRequest> {
        self.opened.lock().unwrap().clone()
    }
}

/// Takes a session off the table however it ends.
struct Seat(FakeVerify, String);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.closers.lock().unwrap().remove(&self.1);
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<OpenResponse, Status>> + Send>>;
type Verdicts = Pin<Box<dyn Stream<Item = Result<SpeculateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl VerifyService for FakeVerify {
    type OpenStream = Events;
    type SpeculateStream = Verdicts;

    async fn open(&self, request: Request<OpenRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.opened.lock().unwrap().push(request.clone());
        if let Some(fault) = &self.script.refuse {
            return Err(fault.clone().into());
        }
        let (closer, closed) = watch::channel(None);
        let id = request.session_id.clone();
        self.closers.lock().unwrap().insert(id.clone(), closer);
        let seat = Seat(self.clone(), id);
        let (sender, receiver) = mpsc::channel(1);
        let script = Arc::clone(&self.script);
        tokio::spawn(async move {
            let _seat = seat;
            // A failed send: the gateway dropped the stream.
            drop(play(&script, &request, &sender, closed).await);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn speculate(
        &self,
        _: Request<Streaming<SpeculateRequest>>,
    ) -> Result<Response<Verdicts>, Status> {
        Err(Fault::NotFound("not here".to_owned()).into())
    }

    async fn close(
        &self,
        request: Request<CloseRequest>,
    ) -> Result<Response<CloseResponse>, Status> {
        let request = request.into_inner();
        if !self.script.deaf {
            let closers = self.closers.lock().unwrap();
            let closer = closers
                .get(&request.session_id)
                .ok_or_else(|| Fault::NotFound("no such session".to_owned()))?;
            closer.send_replace(Some(request.reason()));
        }
        Ok(Response::new(CloseResponse {}))
    }

    async fn inspect(
        &self,
        request: Request<InspectRequest>,
    ) -> Result<Response<InspectResponse>, Status> {
        let columns = request.into_inner().columns;
        Ok(Response::new(InspectResponse {
            tokens: 1_000,
            num_layers: 2,
            columns,
            kept: vec![255; 2 * columns as usize],
        }))
    }

    async fn verify_status(
        &self,
        _: Request<VerifyStatusRequest>,
    ) -> Result<Response<VerifyStatusResponse>, Status> {
        Ok(Response::new(VerifyStatusResponse {
            model: Some(self.script.model.clone()),
            load: Some(WorkerLoad::default()),
            protocol_version: PROTOCOL_VERSION,
        }))
    }
}

async fn play(
    script: &Script,
    request: &OpenRequest,
    sender: &mpsc::Sender<Result<OpenResponse, Status>>,
    mut closed: watch::Receiver<Option<FinishReason>>,
) -> Result<(), mpsc::error::SendError<Result<OpenResponse, Status>>> {
    let event = |event| Ok(OpenResponse { event: Some(event) });
    let limits = request.limits.clone().unwrap_or_default();
    let prompt = request.prompt_tokens as usize;
    let room = script.model.max_context as usize - prompt;
    let most = limits
        .max_tokens
        .map_or(room, |most| room.min(most as usize));
    let top = request.sampling.as_ref().and_then(|s| s.logprobs);
    sender.send(event(Event::Opened(Opened {}))).await?;
    let opened_with = request.token_ids.len() - prompt;
    let mut done = opened_with;
    let hangs_up = |done: usize| script.hangs_up_at.is_some_and(|at| done >= at);
    if hangs_up(done) {
        return Ok(());
    }
    let mut reason = FinishReason::Length;
    'events: while done < most {
        tokio::select! {
            () = tokio::time::sleep(script.pace) => {}
            () = sender.closed() => return Ok(()),
            asked = closed.wait_for(Option::is_some) => {
                reason = asked.ok().and_then(|asked| *asked).unwrap();
                break 'events;
            }
        }
        let mut tokens: Vec<u32> = (done..most.min(done + script.block))
            .map(|index| script.tokens[index % script.tokens.len()])
            .collect();
        let stops = |token: &u32| {
            limits.stop_token_ids.contains(token) || (!limits.ignore_eos && *token == 1)
        };
        let stop = tokens.iter().position(stops);
        if let Some(stop) = stop {
            tokens.truncate(stop + 1);
        }
        let logprobs = match top {
            Some(_) => vec![TokenLogprobs::default(); tokens.len()],
            None => Vec::new(),
        };
        let committed = Committed {
            start: script.wrong_start.unwrap_or((prompt + done) as u64),
            token_ids: tokens.clone(),
            logprobs,
            origins: origins(tokens.len()),
            stats: Some(stats(done + tokens.len() - opened_with)),
        };
        if script.looks_ahead {
            let (start, end) = (prompt + done, prompt + done + tokens.len());
            let shown = Provisional {
                start: start as u64,
                token_ids: tokens
                    .iter()
                    .copied()
                    .chain([7])
                    .take(most - done)
                    .collect(),
            };
            sender.send(event(Event::Provisional(shown))).await?;
            // Time for the client to be shown it.
            tokio::time::sleep(script.pace).await;
            let back = RolledBack { to: end as u64 };
            sender.send(event(Event::RolledBack(back))).await?;
        }
        done += tokens.len();
        sender
            .send(event(Event::Committed(committed.clone())))
            .await?;
        if let Some(added) = script.repeats {
            let mut again = committed;
            again.token_ids.iter_mut().for_each(|token| *token += added);
            sender.send(event(Event::Committed(again))).await?;
        }
        if hangs_up(done) {
            return Ok(());
        }
        if stop.is_some() {
            reason = FinishReason::Stop;
            break;
        }
    }
    let finished = SessionFinished {
        reason: reason.into(),
        stats: Some(stats(done - opened_with)),
    };
    sender.send(event(Event::Finished(finished))).await
}

/// All accepted but the last.
fn origins(tokens: usize) -> Vec<i32> {
    let of = |index| match index + 1 == tokens {
        true => TokenOrigin::Bonus.into(),
        false => TokenOrigin::Accepted.into(),
    };
    (0..tokens).map(of).collect()
}

/// A forward per token, after a prompt of which two tokens were processed before.
fn stats(tokens: usize) -> SessionStats {
    SessionStats {
        target_forwards: tokens as u64,
        cached_prompt_tokens: 2,
        ..SessionStats::default()
    }
}
