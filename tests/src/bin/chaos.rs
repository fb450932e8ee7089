//! `chaos`: endures seeded faults for as long as asked, and says what became of every session.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use specattn_tests::chaos::{Options, run};

/// Kill, freeze, slow down, partition and delay a fleet of real processes under load; every session must end with its own
/// tokens or be refused cleanly, and nothing may stay behind
#[derive(Debug, Parser)]
struct Args {
    /// Key of faults and requests
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// How long faults strike
    #[arg(long, value_name = "SECONDS", default_value_t = 1_800)]
    seconds: u64,

    /// Sessions at a time
    #[arg(long, value_name = "N", default_value_t = 8)]
    clients: u64,

    /// Fail with fewer sessions than this
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_sessions: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    let verdict = run(Options {
        seed: args.seed,
        duration: Duration::from_secs(args.seconds),
        clients: args.clients,
    })
    .await;
    println!("{verdict}");
    if let Err(faults) = verdict.check() {
        eprintln!("{faults}");
        return ExitCode::FAILURE;
    }
    if verdict.account.sessions() < args.min_sessions {
        eprintln!("fewer than {} sessions", args.min_sessions);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
