//! `specattn`: parse, start the log, run the command, exit with its code.

use std::process::ExitCode;

use clap::Parser;
use specattn_cli::args::{Cli, Command};
use specattn_cli::error::EXIT_USAGE;
use specattn_cli::{
    CliError, align, bench, catalog, eval, generate, health, key, resume, serve, status, top,
};
use specattn_service::args::TraceArgs;
use specattn_service::telemetry;
use specattn_worker::args::IoArgs;

fn main() -> ExitCode {
    #[cfg(feature = "cuda")]
    specattn_engine::cuda::keep_multicast_off();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            // Where even this cannot be printed, the exit code is all there is to say.
            return match error.print() {
                Ok(()) => code.into(),
                Err(_) => EXIT_USAGE.into(),
            };
        }
    };
    match run(&cli.command) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("specattn: {error}");
            error.exit_code().into()
        }
    }
}

fn run(command: &Command) -> Result<u8, CliError> {
    let untraced = TraceArgs::default();
    let recorded = match command {
        Command::Generate(args) => Some((&args.telemetry, &untraced)),
        Command::Resume(args) => Some((&args.telemetry, &untraced)),
        Command::Serve(args) => Some((&args.telemetry, &args.traces)),
        Command::Status(_)
        | Command::Top(_)
        | Command::Models(_)
        | Command::Align(_)
        | Command::Eval(_)
        | Command::Bench(_)
        | Command::Health(_)
        | Command::Key(_) => None,
    };
    let _telemetry = recorded
        .map(|(log, traces)| telemetry::init(log, traces, "specattn"))
        .transpose()?;
    // One thread for all messages: they never change threads on their way, and the engines have the other cores. Only a server, of
    // many sessions, may have more.
    let runtime = match command {
        Command::Serve(args) => args.io.runtime()?,
        _ => IoArgs::ONE.runtime()?,
    };
    let code = runtime.block_on(async {
        match command {
            Command::Generate(args) => generate::run(args).await,
            Command::Resume(args) => resume::run(args).await,
            Command::Serve(args) => serve::run(args).await.map(|()| 0),
            Command::Status(args) => status::run(args).await.map(|()| 0),
            Command::Top(args) => top::run(args).await.map(|()| 0),
            Command::Models(args) => catalog::run(args).map(|()| 0),
            Command::Align(args) => align::run(args).map(|()| 0),
            Command::Eval(args) => eval::run(args).map(|()| 0),
            Command::Bench(args) => bench::run(args).await.map(|()| 0),
            Command::Health(args) => health::run(args).await.map(|()| 0),
            Command::Key(args) => key::run(args).map(|()| 0),
        }
    });
    // A model that is still loading on a blocking thread must not hold up the exit.
    runtime.shutdown_background();
    code
}
