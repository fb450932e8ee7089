//! `specattn generate`: one request, its text as it comes, and what it cost.
//!
//! Ctrl-C cancels the session at the gateway and reports what there is; a second one ends the process at once. A session at
//! a gateway elsewhere is resumed when the connection breaks.

use std::io::{self, Write};
use std::time::Duration;

use specattn_proto::v1;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_service::shutdown;
use tokio_util::sync::CancellationToken;

use crate::all_in_one::{AllInOne, Plan};
use crate::args::GenerateArgs;
use crate::connect::Gateway;
use crate::error::{CliError, EXIT_INTERRUPTED};
use crate::output::Report;
use crate::request;
use crate::session::Session;

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
        (Some(url), _) => Gateway::new(url, &args.connect)?,
        (None, Some(services)) => Gateway::open(services.gateway()),
        (None, None) => unreachable!("without a gateway the services were started"),
    };
    let report = generate(args, &gateway, request, &interrupt).await;
    if let Some(services) = services {
        services.stop(STOP_TIMEOUT).await;
    }
    conclude(&report?, args.json, args.quiet, &interrupt)
}

/// Prints what a generation came to; gives the exit code.
///
/// # Errors
/// [`CliError::Write`].
pub(crate) fn conclude(
    report: &Report,
    json: bool,
    quiet: bool,
    interrupt: &CancellationToken,
) -> Result<u8, CliError> {
    if json {
        print_json(report)?;
    }
    if !quiet {
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
    let starting = async {
        let plan = Plan::new(&args.models, with_draft, !args.quiet).await?;
        AllInOne::start(plan).await
    };
    tokio::select! {
        started = starting => started,
        () = interrupt.cancelled() => Err(CliError::Interrupted),
    }
}

async fn generate(
    args: &GenerateArgs,
    gateway: &Gateway,
    request: v1::GenerateRequest,
    interrupt: &CancellationToken,
) -> Result<Report, CliError> {
    let opening = async {
        let mut client = GenerationServiceClient::new(gateway.connect().await?);
        let stream = client.generate(request).await?.into_inner();
        Ok::<_, CliError>((client, stream))
    };
    let (client, stream) = tokio::select! {
        opened = opening => opened?,
        () = interrupt.cancelled() => return Err(CliError::Interrupted),
    };
    let session = Session::new(client, stream, !args.json);
    let session = match &args.gateway {
        Some(_) => session.resuming_at(gateway),
        // The gateway of this process dies with it.
        None => session,
    };
    session.report(interrupt).await
}

/// Writes to standard output at once.
pub(crate) fn write_out(bytes: &[u8]) -> Result<(), CliError> {
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
