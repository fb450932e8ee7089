//! `specattn generate`: one request, its text as it comes, and what it cost.
//!
//! Ctrl-C cancels the session at the gateway and reports what there is; a second one ends the process at once.

use std::io::{self, Write};
use std::time::Duration;

use specattn_proto::v1;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_service::{channel, shutdown};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::all_in_one::{AllInOne, Plan};
use crate::args::GenerateArgs;
use crate::error::{CliError, EXIT_INTERRUPTED};
use crate::output::Report;
use crate::request;

/// How long a cancelled session may take to say so.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// What the services of this process get to end in, once the text is there.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the command; gives the exit code.
///
/// # Errors
/// Any [`CliError`]; nothing was written to standard output unless text had begun to stream.
pub async fn run(args: &GenerateArgs) -> Result<u8, CliError> {
    let request = request::build(args)?;
    let interrupt = shutdown::on_signal()?;
    let services = match &args.gateway {
        Some(_) => None,
        None => Some(start_services(args, &interrupt).await?),
    };
    let gateway = match (&args.gateway, &services) {
        (Some(url), _) => url.as_str(),
        (None, Some(services)) => services.gateway(),
        (None, None) => unreachable!("without a gateway the services were started"),
    };
    let report = generate(args, gateway, request, &interrupt).await;
    if let Some(services) = services {
        services.stop(STOP_TIMEOUT).await;
    }
    let report = report?;
    if args.json {
        print_json(&report)?;
    }
    if !args.quiet {
        eprintln!("{}", report.summary());
    }
    let interrupted = interrupt.is_cancelled() && report.was_cancelled();
    Ok(if interrupted { EXIT_INTERRUPTED } else { 0 })
}

async fn start_services(
    args: &GenerateArgs,
    interrupt: &CancellationToken,
) -> Result<AllInOne, CliError> {
    let with_draft = request::wants_draft(&args.speculation);
    let plan = Plan::new(&args.models, with_draft, !args.quiet)?;
    tokio::select! {
        started = AllInOne::start(plan) => started,
        () = interrupt.cancelled() => Err(CliError::Interrupted),
    }
}

async fn generate(
    args: &GenerateArgs,
    gateway: &str,
    request: v1::GenerateRequest,
    interrupt: &CancellationToken,
) -> Result<Report, CliError> {
    let opening = async {
        let mut client = GenerationServiceClient::new(channel::connect(gateway).await?);
        let stream = client.generate(request).await?.into_inner();
        Ok::<_, CliError>((client, stream))
    };
    let (client, stream) = tokio::select! {
        opened = opening => opened?,
        () = interrupt.cancelled() => return Err(CliError::Interrupted),
    };
    let mut session = Session {
        client,
        stream,
        started: None,
        text: String::new(),
        token_ids: Vec::new(),
        echo: !args.json,
    };
    let finished = session.follow(interrupt).await;
    let ended = session.end_line();
    let finished = finished?;
    ended?;
    let started = session
        .started
        .ok_or(CliError::Protocol("Finished came before Started"))?;
    Ok(Report::new(
        args.mode,
        &started,
        (session.text, session.token_ids),
        finished,
    ))
}

/// A running generation, as far as it has come.
struct Session {
    client: GenerationServiceClient<Channel>,
    stream: Streaming<v1::GenerateResponse>,
    started: Option<v1::Started>,
    text: String,
    token_ids: Vec<u32>,
    /// Whether text goes to standard output as it comes.
    echo: bool,
}

impl Session {
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
            // Dropping the stream cancels what has not begun.
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
            let response = self.stream.message().await?;
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
        if delta.start != self.token_ids.len() as u64 {
            return Err(CliError::Protocol("tokens are missing from the stream"));
        }
        self.token_ids.extend(delta.token_ids);
        self.text.push_str(&delta.text);
        if self.echo && !delta.text.is_empty() {
            write_out(delta.text.as_bytes())?;
        }
        Ok(())
    }

    /// Ends the last line of streamed text, so that what follows starts on one of its own.
    fn end_line(&self) -> Result<(), CliError> {
        if !self.echo || self.text.is_empty() || self.text.ends_with('\n') {
            return Ok(());
        }
        write_out(b"\n")
    }
}

/// Writes to standard output at once.
fn write_out(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .map_err(CliError::Write)
}

fn print_json(report: &Report) -> Result<(), CliError> {
    let mut json = serde_json::to_vec(report).map_err(|error| CliError::Write(error.into()))?;
    json.push(b'\n');
    write_out(&json)
}
