//! [`Session`]: a generation as its client follows it, over broken connections too.

use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_service::Backoff;
use specattn_service::channel::Link;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;

use crate::args::Mode;
use crate::connect::Gateway;
use crate::error::CliError;
use crate::generate::write_out;
use crate::output::Report;

/// How long a cancelled session may take to say so.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a broken session is tried to be resumed.
const RESUME_PATIENCE: Duration = Duration::from_secs(60);

/// First and longest pause between two tries.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MOST: Duration = Duration::from_secs(2);

/// A running generation, as far as it has come.
pub(crate) struct Session {
    client: GenerationServiceClient<Link>,
    stream: Streaming<v1::GenerateResponse>,
    started: Option<v1::Started>,
    text: String,
    token_ids: Vec<u32>,
    /// What lies before `token_ids` and `text`: the client asked for no more than what follows.
    before: (u64, u64),
    /// Whether text goes to standard output as it comes.
    echo: bool,
    /// The gateway at which it is resumed when its stream breaks.
    gateway: Option<Gateway>,
}

impl Session {
    /// A session whose stream begins.
    pub(crate) fn new(
        client: GenerationServiceClient<Link>,
        stream: Streaming<v1::GenerateResponse>,
        echo: bool,
    ) -> Self {
        Self {
            client,
            stream,
            started: None,
            text: String::new(),
            token_ids: Vec::new(),
            before: (0, 0),
            echo,
            gateway: None,
        }
    }

    /// The session `session_id` from completion token `from` on.
    ///
    /// # Errors
    /// What the gateway says.
    pub(crate) async fn resumed(
        gateway: &Gateway,
        session_id: String,
        from: u64,
        echo: bool,
    ) -> Result<Self, CliError> {
        let (client, stream) = resume(gateway, session_id, from).await?;
        let mut session = Self::new(client, stream, echo).resuming_at(gateway);
        session.before.0 = from;
        Ok(session)
    }

    /// It is resumed there when its stream breaks.
    pub(crate) fn resuming_at(mut self, gateway: &Gateway) -> Self {
        self.gateway = Some(gateway.clone());
        self
    }

    /// Follows the session to its end; an interrupt cancels it.
    ///
    /// # Errors
    /// Any [`CliError`].
    pub(crate) async fn report(
        mut self,
        interrupt: &CancellationToken,
    ) -> Result<Report, CliError> {
        let finished = self.follow(interrupt).await;
        let ended = self.end_line();
        let finished = finished?;
        ended?;
        let started = self
            .started
            .ok_or(CliError::Protocol("Finished came before Started"))?;
        let mode = Mode::of(started.mode()).ok_or(CliError::Protocol("the mode is unknown"))?;
        let completion = (self.text, self.token_ids);
        Ok(Report::new(mode, &started, completion, finished))
    }

    /// Reads events to the end; an interrupt cancels the session and reads on.
    async fn follow(&mut self, interrupt: &CancellationToken) -> Result<v1::Finished, CliError> {
        let finished = tokio::select! {
            finished = self.read() => return finished,
            () = interrupt.cancelled() => self.cancel(),
        };
        match tokio::time::timeout(CANCEL_TIMEOUT, finished).await {
            Ok(finished) => finished,
            Err(_) => Err(CliError::Interrupted),
        }
    }

    async fn cancel(&mut self) -> Result<v1::Finished, CliError> {
        let Some(started) = &self.started else {
            // What has not begun ends with its stream.
            return Err(CliError::Interrupted);
        };
        let request = v1::CancelRequest {
            session_id: started.session_id.clone(),
        };
        match self.client.cancel(request).await {
            // Not found: it has just ended by itself, and its stream says how.
            Err(status) if status.code() != tonic::Code::NotFound => Err(status.into()),
            _ => self.read().await,
        }
    }

    async fn read(&mut self) -> Result<v1::Finished, CliError> {
        loop {
            let response = match self.stream.message().await {
                Ok(response) => response,
                Err(status) => {
                    self.resume(Fault::from_status(&status)).await?;
                    continue;
                }
            };
            let response =
                response.ok_or(CliError::Protocol("the stream ended without Finished"))?;
            match response.event {
                Some(Event::Started(started)) => self.started = Some(started),
                Some(Event::Delta(delta)) => self.take(delta)?,
                Some(Event::Finished(finished)) => return Ok(finished),
                // Not asked for.
                Some(Event::Provisional(_) | Event::Withdrawn(_)) => {}
                None => return Err(CliError::Protocol("an event of an unknown kind came")),
            }
        }
    }

    fn take(&mut self, delta: v1::Delta) -> Result<(), CliError> {
        let tokens = self.before.0 + self.token_ids.len() as u64;
        if delta.start != tokens {
            return Err(CliError::Protocol("tokens are missing from the stream"));
        }
        if self.token_ids.is_empty() && self.text.is_empty() {
            self.before.1 = delta.text_start;
        }
        let text = self.before.1 + self.text.len() as u64;
        if delta.text_start != text {
            // The text held back until the end came before the connection broke.
            let known = delta.token_ids.is_empty() && delta.text_start < text;
            return if known {
                Ok(())
            } else {
                Err(CliError::Protocol("text is missing from the stream"))
            };
        }
        self.token_ids.extend(delta.token_ids);
        self.text.push_str(&delta.text);
        if self.echo && !delta.text.is_empty() {
            write_out(delta.text.as_bytes())?;
        }
        Ok(())
    }

    /// Takes the session up again after its stream broke for this reason; gives up when that is no use.
    async fn resume(&mut self, broken: Fault) -> Result<(), CliError> {
        let (Some(gateway), Some(started)) = (&self.gateway, &self.started) else {
            return Err(broken.into());
        };
        let until = Instant::now() + RESUME_PATIENCE;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_MOST);
        let mut fault = broken.clone();
        tracing::warn!(%fault, "the stream broke: resuming");
        loop {
            let pause = match &fault {
                Fault::Unavailable(_) => backoff.delay(),
                Fault::ResourceExhausted {
                    retry_after: Some(after),
                    ..
                } => *after,
                // The gateway keeps no log, or not any more: what broke the stream says more.
                Fault::NotFound(_) => return Err(broken.into()),
                _ => return Err(fault.into()),
            };
            if Instant::now() + pause >= until {
                return Err(fault.into());
            }
            tokio::time::sleep(pause).await;
            let from = self.before.0 + self.token_ids.len() as u64;
            match resume(gateway, started.session_id.clone(), from).await {
                Ok((client, stream)) => {
                    self.client = client;
                    self.stream = stream;
                    return Ok(());
                }
                Err(again) => fault = again,
            }
        }
    }

    /// Ends the last line of streamed text, so that what follows starts on one of its own.
    fn end_line(&self) -> Result<(), CliError> {
        if !self.echo || self.text.is_empty() || self.text.ends_with('\n') {
            return Ok(());
        }
        write_out(b"\n")
    }
}

async fn resume(
    gateway: &Gateway,
    session_id: String,
    from_index: u64,
) -> Result<
    (
        GenerationServiceClient<Link>,
        Streaming<v1::GenerateResponse>,
    ),
    Fault,
> {
    let mut client = GenerationServiceClient::new(gateway.connect().await?);
    let request = v1::ResumeRequest {
        session_id,
        from_index,
    };
    match client.resume(request).await {
        Ok(response) => Ok((client, response.into_inner())),
        Err(status) => Err(Fault::from_status(&status)),
    }
}
