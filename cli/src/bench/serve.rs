//! `specattn bench serve`: finds or starts the services, measures each load, tells the results.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use specattn_proto::v1;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_quality::Book;
use specattn_service::channel::Link;

use crate::all_in_one::{AllInOne, Plan};
use crate::bench::args::{BenchArgs, BenchCommand, ServeBenchArgs};
use crate::bench::arrivals::Load;
use crate::bench::load_test::LoadTest;
use crate::bench::plot;
use crate::bench::prompts::{Source, Workload};
use crate::bench::report::{Report, Setup};
use crate::connect::Gateway;
use crate::error::CliError;
use crate::models::ModelFolders;
use crate::request;

/// What the services of this process get to end in.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the command.
///
/// # Errors
/// Any [`CliError`]; requests that fail are results, not errors.
pub async fn run(args: &BenchArgs) -> Result<(), CliError> {
    let BenchCommand::Serve(args) = &args.command;
    let decoding = request::decoding(args.mode, &args.sampling, &args.speculation);
    request::check_ranges(&decoding)?;
    let text = read_text(args)?;
    let services = match &args.gateway {
        Some(_) => None,
        None => {
            let with_draft = request::wants_draft(&args.speculation);
            let plan = Plan::new(&args.models, with_draft, !args.quiet).await?;
            Some(AllInOne::start(plan).await?)
        }
    };
    let gateway = match (&args.gateway, &services) {
        (Some(url), _) => Gateway::new(url, &args.connect)?,
        (None, Some(services)) => Gateway::open(services.gateway()),
        (None, None) => unreachable!("without a gateway the services were started"),
    };
    let report = measure(args, &gateway, decoding, text).await;
    if let Some(services) = services {
        services.stop(STOP_TIMEOUT).await;
    }
    tell(args, &report?)
}

async fn measure(
    args: &ServeBenchArgs,
    gateway: &Gateway,
    decoding: v1::GenerateRequest,
    text: Vec<u32>,
) -> Result<Report, CliError> {
    let mut channels = Vec::new();
    for _ in 0..args.connections {
        channels.push(gateway.connect().await?);
    }
    let target = target_model(channels[0].clone()).await?;
    if let Some(token) = text.iter().find(|&&token| token >= target.vocab_size) {
        return Err(CliError::Usage(format!(
            "token {token} of --text is not in the vocabulary of {}: name its folder with --target",
            target.name
        )));
    }
    let source = if text.is_empty() {
        Source::Random(target.vocab_size)
    } else {
        Source::Text(text)
    };
    let test = LoadTest {
        channels,
        workload: Arc::new(Workload {
            decoding,
            source,
            prompt_tokens: args.prompt_tokens,
            output_tokens: args.output_tokens,
            max_context: target.max_context,
            shared_prefix: args.shared_prefix,
            stop_at_eos: args.stop_at_eos,
            seed: args.sampling.seed.unwrap_or(0),
        }),
        warmup: Duration::from_secs_f64(args.warmup),
        duration: Duration::from_secs_f64(args.duration),
        patience: Duration::from_secs_f64(args.patience),
        max_in_flight: args.max_in_flight,
        target: args.goodput.unwrap_or_default(),
    };
    let bar = progress_line(!args.quiet);
    let mut loads = Vec::new();
    for load in loads_of(args) {
        loads.push(test.run(load, &bar).await);
    }
    bar.finish_and_clear();
    let setup = Setup::here(target.name, args.gateway.is_none(), args.goodput.is_some());
    Ok(Report::new(setup, loads))
}

fn loads_of(args: &ServeBenchArgs) -> Vec<Load> {
    let rates = args.rate.iter().map(|&rate| Load::Rate(rate));
    let clients = args.concurrency.iter().map(|&c| Load::Concurrency(c));
    rates.chain(clients).collect()
}

/// The tokens of the texts, one after the other, or none.
fn read_text(args: &ServeBenchArgs) -> Result<Vec<u32>, CliError> {
    if args.text.is_empty() {
        return Ok(Vec::new());
    }
    let folder = ModelFolders::find(&args.models, false)?.target;
    let mut tokens = Vec::new();
    for path in &args.text {
        tokens.extend(Book::read(&folder, path)?.tokens);
    }
    if tokens.is_empty() {
        return Err(CliError::Usage("--text holds no text".to_owned()));
    }
    Ok(tokens)
}

/// The model of a verify worker of the gateway.
async fn target_model(channel: Link) -> Result<v1::ModelInfo, CliError> {
    let mut client = RegistryServiceClient::new(channel);
    let status = client.status(v1::StatusRequest {}).await?.into_inner();
    let mut verify = status
        .workers
        .into_iter()
        .filter(|worker| worker.role() == v1::WorkerRole::Verify);
    verify
        .find_map(|worker| worker.model)
        .filter(|model| model.vocab_size > 0)
        .ok_or_else(|| CliError::Usage("the gateway has no verify worker to measure".to_owned()))
}

/// A line on standard error that says how it goes; none where that is no terminal, or when not wanted.
fn progress_line(wanted: bool) -> ProgressBar {
    if !wanted || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style =
        ProgressStyle::with_template("{spinner} {msg}").expect("the template is well-formed");
    ProgressBar::new_spinner().with_style(style)
}

/// Prints the results, and writes the files that were asked for.
fn tell(args: &ServeBenchArgs, report: &Report) -> Result<(), CliError> {
    let markdown = report.markdown();
    let json = serde_json::to_string_pretty(report).map_err(|e| CliError::Write(e.into()))? + "\n";
    if let Some(folder) = &args.out {
        write_files(folder, &markdown, &json, &plot::svg(report)).map_err(CliError::Write)?;
    }
    let text = if args.json { &json } else { &markdown };
    io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .map_err(CliError::Write)
}

fn write_files(folder: &Path, markdown: &str, json: &str, svg: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("serve.md"), markdown)?;
    fs::write(folder.join("serve.json"), json)?;
    fs::write(folder.join("serve.svg"), svg)
}
