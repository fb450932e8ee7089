//! `GenerationService`: the client's side of the gateway.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use specattn_proto::v1::generation_service_server::GenerationService;
use specattn_proto::v1::{CancelRequest, CancelResponse, GenerateRequest, ResumeRequest};
use specattn_proto::{Fault, SessionId};
use specattn_service::trace::Parent;
use tonic::{Request, Response, Status};
use tracing::field::{Empty, display};
use tracing::{Instrument, Span};

use crate::Gateway;
use crate::admission::ClientKey;
use crate::clients::KnownClient;
use crate::completion::Completion;
use crate::listener::{ClientStream, Listener};
use crate::opening::Opening;
use crate::pass::Pass;
use crate::plan::Plan;
use crate::registry::Prefix;
use crate::session::{Session, Times};
use crate::session_table::{SessionEntry, SessionSlot};
use crate::tally::Tally;
use crate::transcript::{Reader, Transcript};

/// Who asks for a session.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) client: KnownClient,
    /// Whose turn it takes in the line.
    pub(crate) line: ClientKey,
    /// How long the session goes on without it.
    pub(crate) linger: Duration,
    /// What it traces.
    pub(crate) trace: Parent,
}

/// What a session's log lines and spans belong to.
fn session_span() -> Span {
    tracing::info_span!("session", session_id = Empty, trace_id = Empty)
}

/// What those hear who ask for a session that is not there, or not theirs.
pub(crate) fn unknown(id: SessionId) -> Fault {
    Fault::NotFound(format!("no session {id}"))
}

/// The gateway as a tonic service.
pub(crate) struct Generation(pub(crate) Arc<Gateway>);

#[tonic::async_trait]
impl GenerationService for Generation {
    type GenerateStream = ClientStream;
    type ResumeStream = ClientStream;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<ClientStream>, Status> {
        let caller = self.0.caller(&request)?;
        let stream = self.0.generate(request.into_inner(), caller).await?;
        Ok(Response::new(stream))
    }

    async fn resume(
        &self,
        request: Request<ResumeRequest>,
    ) -> Result<Response<ClientStream>, Status> {
        let id: SessionId = request.get_ref().session_id.parse()?;
        let from = request.get_ref().from_index;
        let caller = self.0.caller(&request)?;
        let span = session_span();
        span.record("session_id", display(id));
        caller.trace.adopt(&span);
        let stream = async {
            match self.0.sessions.get(id) {
                Some(entry) => {
                    entry.check_owner(&caller.client)?;
                    self.0.listen(&entry, from)
                }
                None => self.0.resume_logged(id, from, caller).await,
            }
        };
        let stream = stream.instrument(span.clone()).await;
        let stream = stream.inspect_err(|fault| {
            span.in_scope(|| tracing::info!(code = fault.label(), %fault, "not resumed"));
        })?;
        Ok(Response::new(stream))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let client = KnownClient::of(request.extensions())?;
        let id: SessionId = request.into_inner().session_id.parse()?;
        let entry = self.0.sessions.get(id);
        let entry = entry.ok_or_else(|| unknown(id))?;
        entry.check_owner(&client)?;
        entry.cancel.cancel();
        Ok(Response::new(CancelResponse {}))
    }
}

impl Gateway {
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Fault> {
        let address = request.remote_addr().map(|address| address.ip());
        let client = KnownClient::of(request.extensions())?;
        Ok(Caller {
            line: ClientKey::of(&client, request.metadata().as_ref(), address),
            client,
            linger: self.config.linger(),
            trace: Parent::of(request.metadata().as_ref()),
        })
    }

    /// Waits for a place for the caller, if its key lets it have one.
    pub(crate) async fn admit(&self, caller: &Caller) -> Result<Pass, Fault> {
        if self.shutdown.is_cancelled() {
            return Err(Fault::Unavailable("the gateway is draining".to_owned()));
        }
        let key = caller.client.begin()?;
        let arrival = Instant::now();
        let waiting = self.admission.admit(caller.line.clone());
        let ticket = waiting.instrument(tracing::info_span!("queue")).await?;
        self.metrics.admitted(arrival.elapsed());
        Ok(Pass::new(ticket, key))
    }

    /// A new session, and its client's stream.
    pub(crate) async fn generate(
        self: &Arc<Self>,
        request: GenerateRequest,
        caller: Caller,
    ) -> Result<ClientStream, Fault> {
        let begun = self.begin(request, caller).await;
        begun.inspect_err(|fault| self.metrics.ended(fault.label()))
    }

    async fn begin(
        self: &Arc<Self>,
        request: GenerateRequest,
        caller: Caller,
    ) -> Result<ClientStream, Fault> {
        let arrival = SystemTime::now();
        let span = session_span();
        caller.trace.adopt(&span);
        let begun = async {
            let pass = self.admit(&caller).await?;
            let slot = self.sessions.reserve(caller.linger);
            Span::current().record("session_id", display(slot.entry.id));
            let owner = caller.client.owner();
            self.start((request, owner), arrival, slot, pass).await
        };
        begun.instrument(span.clone()).await.inspect_err(|fault| {
            span.in_scope(|| tracing::info!(code = fault.label(), %fault, "request refused"));
        })
    }

    /// Checks a request, opens its session and starts the tasks that carry it.
    async fn start(
        self: &Arc<Self>,
        (request, owner): (GenerateRequest, &str),
        arrival: SystemTime,
        slot: SessionSlot,
        pass: Pass,
    ) -> Result<ClientStream, Fault> {
        let id = slot.entry.id;
        let plan = self.plan(request).await?;
        let barred = BTreeSet::new();
        let opening = Opening {
            registry: &self.registry,
            request: &|model| {
                plan.fits(model)?;
                Ok(plan.open_request(id))
            },
            prefix: Prefix::of(&plan.prompt),
            barred: &barred,
            patience: self.admission.patience(),
            waits_for_workers: false,
        };
        let waited = arrival.elapsed().unwrap_or_default();
        let open = match plan.deadline {
            Some(deadline) => {
                let left = deadline.saturating_sub(waited);
                let opened = tokio::time::timeout(left, opening.open()).await;
                opened.map_err(|_| {
                    Fault::DeadlineExceeded(
                        "the deadline passed before the session began".to_owned(),
                    )
                })??
            }
            None => opening.open().await?,
        };

        let recipe = plan.recipe(id, owner, arrival, &open.worker.model);
        pass.spend(plan.prompt.len());
        let writer = match &self.log {
            Some(log) => Some(log.begin(id, recipe.logged().clone()).await?),
            None => None,
        };
        let completion = Completion::new(
            Arc::clone(&self.tokenizer),
            recipe.prompt(),
            recipe.stops().to_vec(),
            recipe.stop_tokens().to_vec(),
        )?;
        self.metrics.opened(recipe.prompt().len());
        tracing::info!(
            mode = recipe.mode().as_str_name(),
            prompt_tokens = recipe.prompt().len(),
            verify_worker = %open.worker.id,
            draft_length = plan.draft_length(),
            "session opened"
        );
        let session = Session {
            gateway: Arc::clone(self),
            slot,
            pass,
            transcript: Arc::new(Transcript::new(recipe.prompt().to_vec())),
            completion,
            writer,
            tally: Tally::default(),
            first_token: None,
            stop: None,
            times: Times::of(&recipe),
            barred,
            fruitless: 0,
            recipe,
        };
        self.carry(session, open, 0)
    }

    /// Starts the tasks of an open session, and its client's stream from completion token `from` on.
    pub(crate) fn carry(
        &self,
        session: Session,
        open: crate::opening::OpenSession,
        from: u64,
    ) -> Result<ClientStream, Fault> {
        let entry = Arc::clone(&session.slot.entry);
        entry.opened(session.recipe.clone(), Arc::clone(&session.transcript));
        let stream = self.listen(&entry, from)?;
        self.tasks.spawn(session.run(open).in_current_span());
        Ok(stream)
    }

    /// A client's stream of a session that runs.
    pub(crate) fn listen(&self, entry: &SessionEntry, from: u64) -> Result<ClientStream, Fault> {
        let facts = entry
            .facts()
            .ok_or_else(|| Fault::Unavailable("the session is being opened".to_owned()))?;
        let reader = Reader::new(Arc::clone(&facts.transcript), from)?;
        let started = facts.recipe.started(entry.id);
        let (listener, stream) = Listener::new(reader, started, self.config.client_stall_timeout);
        let seat = entry.audience.join();
        self.tasks.spawn(listener.run(Some(seat)).in_current_span());
        Ok(stream)
    }

    /// Checks a request on a thread that may block: tokenizing a long prompt takes a while.
    async fn plan(&self, request: GenerateRequest) -> Result<Plan, Fault> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let config = self.config.clone();
        let known = self.registry.verify_vocab_size();
        let vocab_size = known.unwrap_or_else(|| tokenizer.vocab_size());
        let checking = tokio::task::spawn_blocking(move || {
            Plan::check(request, &|text| tokenizer.encode(text), vocab_size, &config)
        });
        checking
            .await
            .map_err(|error| Fault::Internal(format!("checking the request failed: {error}")))?
    }
}
