//! [`Link`]: the draft's stream to the verify worker of one session, from Join to the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{AttachResponse, SpeculateRequest, SpeculateResponse};
use specattn_proto::{Fault, limits};
use specattn_service::{channel, trace};
use specattn_worker::ServedModel;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::{Stream, StreamExt};
use tonic::Streaming;

use crate::engine_loop::{Command, SessionKey};
use crate::session::Welcome;
use crate::wire::{self, Answer, Joining};

/// Longest wait for a verify worker's welcome.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);

/// A session in the engine. Dropping it frees the session.
pub(crate) struct EngineSession {
    pub(crate) key: SessionKey,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) abandoned: Arc<AtomicBool>,
}

impl Drop for EngineSession {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Release);
        // A full inbox means that the engine is about to look at its sessions anyway.
        let _ = self.commands.try_send(Command::Sweep);
    }
}

/// A draft that its verify worker has welcomed.
pub(crate) struct Link {
    engine: EngineSession,
    answers: Streaming<SpeculateResponse>,
    failed: oneshot::Receiver<Fault>,
}

impl Link {
    /// Joins a session over `channel`.
    ///
    /// # Errors
    /// [`Fault::Unavailable`] when the verify worker cannot be reached; what it answers otherwise.
    pub(crate) async fn join(
        channel: channel::Link,
        joining: Joining,
        model: &ServedModel,
        engine: EngineSession,
        proposals: impl Stream<Item = SpeculateRequest> + Send + 'static,
        failed: oneshot::Receiver<Fault>,
    ) -> Result<Self, Fault> {
        let joined = async {
            let first = tokio_stream::once(wire::join(&joining, model.info.clone()));
            let mut answers = speculate(channel, first.chain(proposals)).await?;
            let welcome = answers
                .message()
                .await
                .map_err(|s| Fault::from_status(&s))?;
            let welcome = wire::welcome(welcome, &model.config, joining.known)?;
            Ok::<_, Fault>((welcome, answers))
        };
        let (welcome, answers) = tokio::time::timeout(WELCOME_TIMEOUT, joined)
            .await
            .map_err(|_| Fault::Unavailable("the verify worker does not answer".to_owned()))??;
        tracing::info!("attached");
        let link = Self {
            engine,
            answers,
            failed,
        };
        link.tell_welcome(welcome).await?;
        Ok(link)
    }

    async fn tell_welcome(&self, welcome: Welcome) -> Result<(), Fault> {
        let command = Command::Welcome {
            key: self.engine.key,
            welcome: Box::new(welcome),
        };
        let sent = self.engine.commands.send(command).await;
        sent.map_err(|_| engine_gone())
    }

    /// Brings verdicts to the engine until the session ends here or there, or nobody reads `events` any more; tells
    /// `events` why it ended.
    pub(crate) async fn run(mut self, events: mpsc::Sender<Result<AttachResponse, tonic::Status>>) {
        let reason = tokio::select! {
            reason = self.carry() => reason,
            () = events.closed() => return,
        };
        tracing::info!(%reason, "detached");
        // The session is freed before the gateway hears of the end.
        drop(self);
        // A gateway that left meanwhile needs no reason.
        let _ = events.try_send(Ok(wire::detached(reason)));
    }

    /// Carries answers until there are no more; says why.
    async fn carry(&mut self) -> String {
        loop {
            let message = tokio::select! {
                message = self.answers.message() => message,
                fault = &mut self.failed => {
                    return fault.unwrap_or_else(|_| engine_gone()).to_string();
                }
            };
            let verdict = match message.map(|m| m.map(wire::answer)) {
                Ok(Some(Ok(Answer::Verdict(verdict)))) => verdict,
                Ok(Some(Ok(Answer::Closed(reason)))) => {
                    return format!("the session is over: {}", reason.as_str_name());
                }
                Ok(Some(Err(fault))) => return fault.to_string(),
                Ok(None) => return "the verify worker ended the stream".to_owned(),
                Err(status) => return Fault::from_status(&status).to_string(),
            };
            let command = Command::Verdict {
                key: self.engine.key,
                verdict,
            };
            if self.engine.commands.send(command).await.is_err() {
                return engine_gone().to_string();
            }
        }
    }
}

async fn speculate(
    channel: channel::Link,
    requests: impl Stream<Item = SpeculateRequest> + Send + 'static,
) -> Result<Streaming<SpeculateResponse>, Fault> {
    // The welcome carries a session's tokens.
    let mut client = VerifyServiceClient::new(channel)
        .max_decoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES);
    let response = client.speculate(trace::request(requests)).await;
    match response {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => Err(Fault::from_status(&status)),
    }
}

fn engine_gone() -> Fault {
    Fault::Unavailable("the engine is gone".to_owned())
}
