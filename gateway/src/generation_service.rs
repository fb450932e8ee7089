//! `GenerationService`: the client's side of the gateway.

use std::sync::Arc;

use specattn_proto::v1::generation_service_server::GenerationService;
use specattn_proto::v1::{CancelRequest, CancelResponse, GenerateRequest, Started};
use specattn_proto::{Fault, SessionId};
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use crate::Gateway;
use crate::attachment::Attachment;
use crate::completion::Completion;
use crate::delivery::{ClientStream, Delivery};
use crate::opening;
use crate::plan::Plan;
use crate::session::Session;
use crate::session_table::SessionSlot;

#[tonic::async_trait]
impl GenerationService for Gateway {
    type GenerateStream = ClientStream;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<ClientStream>, Status> {
        let slot = self.sessions.reserve()?;
        let span = tracing::info_span!("session", session_id = %slot.entry.id);
        let stream = self
            .start(request.into_inner(), slot)
            .instrument(span.clone())
            .await
            .inspect_err(|fault| {
                span.in_scope(|| tracing::info!(code = fault.label(), %fault, "request refused"));
            })?;
        Ok(Response::new(stream))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let id: SessionId = request.into_inner().session_id.parse()?;
        let entry = self.sessions.get(id);
        let entry = entry.ok_or_else(|| Fault::NotFound(format!("no session {id}")))?;
        entry.cancel.cancel();
        Ok(Response::new(CancelResponse {}))
    }
}

impl Gateway {
    /// Checks a request, opens its session and starts the tasks that carry it.
    async fn start(
        &self,
        request: GenerateRequest,
        slot: SessionSlot,
    ) -> Result<ClientStream, Fault> {
        if self.shutdown.is_cancelled() {
            return Err(Fault::Unavailable("the gateway is draining".to_owned()));
        }
        let plan = self.plan(request).await?;
        let deadline = plan
            .deadline
            .map(|after| Instant::from_std(slot.entry.arrival) + after);
        let opening = opening::open(&plan, slot.entry.id, &self.registry);
        let open = match deadline {
            Some(deadline) => {
                tokio::time::timeout_at(deadline, opening)
                    .await
                    .map_err(|_| {
                        Fault::DeadlineExceeded(
                            "the deadline passed before the session began".to_owned(),
                        )
                    })??
            }
            None => opening.await?,
        };

        let model = Arc::clone(&open.worker.model);
        let completion = Completion::new(
            Arc::clone(&self.tokenizer),
            &plan.prompt,
            plan.stops.clone(),
            plan.stop_tokens(&model),
        )?;
        let max_tokens_total = plan.max_tokens_total(&model);
        let started = Started {
            session_id: slot.entry.id.to_string(),
            // Prompts are bounded far below 2^32 tokens by the message size.
            prompt_tokens: plan.prompt.len() as u32,
            seed: plan.seed,
        };
        tracing::info!(
            mode = plan.mode.as_str_name(),
            prompt_tokens = started.prompt_tokens,
            verify_worker = %open.worker.id,
            draft_length = plan.draft_length(),
            "session opened"
        );
        let drafts = plan.draft_length() > 0;
        slot.entry.opened(plan.mode, open.worker.id, plan.prompt);
        let drafting = drafts.then(|| Attachment {
            entry: Arc::clone(&slot.entry),
            registry: Arc::clone(&self.registry),
            verify: open.worker.clone(),
            policy: plan.draft,
            max_tokens_total: max_tokens_total as u64,
        });
        let (client, stream) = Delivery::new(started, self.config.client_stall_timeout);
        let session = Session::new(slot, open, completion, client, max_tokens_total, deadline);
        self.tasks.spawn(session.run(drafting).in_current_span());
        Ok(stream)
    }

    /// Checks a request on a thread that may block: tokenizing a long prompt takes a while.
    async fn plan(&self, request: GenerateRequest) -> Result<Plan, Fault> {
        let tokenizer = Arc::clone(&self.tokenizer);
        let config = self.config.clone();
        let known = self.registry.verify_vocab_size();
        let vocab_size = known.unwrap_or_else(|| tokenizer.vocab_size());
        tokio::task::spawn_blocking(move || Plan::check(request, &tokenizer, vocab_size, &config))
            .await
            .map_err(|error| Fault::Internal(format!("checking the request failed: {error}")))?
    }
}
