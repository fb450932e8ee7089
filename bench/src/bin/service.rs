//! Times the services around the models: `cargo run --release -p specattn-bench --bin service -- far`.
//!
//! Tables go to standard output in Markdown; `bench/serve/service.md` keeps them, with what was found.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, Parser, Subcommand};
use specattn_bench::service::far::Distance;
use specattn_bench::service::hostile::Street;
use specattn_bench::service::prefix;
use specattn_bench::service::round::{self, Case};
use specattn_bench::service::together;
use specattn_tests::hostile::Hostility;

/// Times the services around the models.
#[derive(Debug, Parser)]
struct Command {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Drafts far from their target
    Far(Far),
    /// What a round costs beside compute
    Round {
        /// Rounds per figure
        #[arg(long, default_value_t = 5000)]
        rounds: usize,
    },
    /// Many sessions on one prompt
    Prefix {
        /// Tokens of the prompt
        #[arg(long, value_delimiter = ',', default_value = "4096")]
        prompts: Vec<usize>,
        /// Sessions that come at once after the first
        #[arg(long, default_value_t = 49)]
        others: usize,
    },
    /// Sessions beside one with a hostile draft worker
    Hostile {
        /// Sessions per figure
        #[arg(long, default_value_t = 9)]
        turns: usize,
    },
    /// Many sessions of a target and a draft on one device
    Together {
        /// Sessions at a time
        #[arg(long, value_delimiter = ',', default_value = "1,4,16,32")]
        sessions: Vec<usize>,
        /// Milliseconds of a target's forward
        #[arg(long, default_value_t = 20)]
        target_ms: u64,
        /// Milliseconds of a draft's
        #[arg(long, default_value_t = 5)]
        draft_ms: u64,
    },
    /// A verify worker whose target answers at once
    #[command(name = round::VERIFY_COMMAND, hide = true)]
    ScriptedVerify {
        /// Where to listen
        address: SocketAddr,
    },
}

#[derive(Debug, Args)]
struct Far {
    /// Milliseconds that each way between draft and verify worker takes
    #[arg(long, default_value_t = 20)]
    one_way_ms: u64,
    /// Milliseconds added to every forward of the slow target
    #[arg(long, default_value_t = 40)]
    forward_ms: u64,
    /// Tokens of a session behind the slow target
    #[arg(long, default_value_t = 256)]
    slow_tokens: u32,
    /// Sessions per figure of the slow target, each with another text
    #[arg(long, default_value_t = 4)]
    slow_passes: usize,
    /// Of the slow target's rows, those whose first columns hold this, as in "sampled 4 auto"
    #[arg(long, default_value = "")]
    rows: String,
    /// Tokens of a session of the plain pair
    #[arg(long, default_value_t = 1500)]
    fast_tokens: u32,
    /// Sessions per figure of the plain pair
    #[arg(long, default_value_t = 7)]
    passes: usize,
}

fn main() -> Result<()> {
    let part = Command::parse().part;
    let block_on = |future: std::pin::Pin<Box<dyn Future<Output = Result<()>>>>| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?
            .block_on(future)
    };
    match part {
        Part::Far(far) => block_on(Box::pin(far_table(far))),
        Part::Round { rounds } => block_on(Box::pin(round_table(rounds))),
        Part::Prefix { prompts, others } => block_on(Box::pin(prefix_table(prompts, others))),
        Part::Hostile { turns } => block_on(Box::pin(hostile_table(turns))),
        Part::Together {
            sessions,
            target_ms,
            draft_ms,
        } => block_on(Box::pin(together_table(sessions, target_ms, draft_ms))),
        Part::ScriptedVerify { address } => round::verify_worker(address),
    }
}

/// Prints what a distance costs, with a slow target and with the plain pair.
async fn far_table(far: Far) -> Result<()> {
    ensure!(
        far.passes > 0 && far.slow_passes > 0,
        "--passes and --slow-passes must be at least 1"
    );
    let distance = Distance {
        one_way: Duration::from_millis(far.one_way_ms),
        forward: Duration::from_millis(far.forward_ms),
        slow_tokens: far.slow_tokens,
        slow_passes: far.slow_passes,
        rows: far.rows,
        fast_tokens: far.fast_tokens,
        passes: far.passes,
    };
    distance.slow_target().await?;
    println!();
    distance.fast_pair().await
}

/// Prints a round's overhead, by its shape.
async fn round_table(rounds: usize) -> Result<()> {
    println!("| round | p50 µs | p90 µs | p99 µs |");
    println!("| --- | --- | --- | --- |");
    let cases = [
        (false, 1, 64),
        (false, 4, 64),
        (true, 4, 64),
        (true, 4, 4_096),
    ];
    for (sparse, draft_length, prompt) in cases {
        let case = Case {
            draft_length,
            sparse,
            prompt,
        };
        let mut times = round::overheads(case, rounds).await?;
        times.sort_unstable();
        let at =
            |share: f64| times[(share * (times.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
        let mode = if sparse { "sparse" } else { "dense" };
        println!(
            "| {mode}, {draft_length} draft tokens, context {prompt} | {:.0} | {:.0} | {:.0} |",
            at(0.5),
            at(0.9),
            at(0.99)
        );
    }
    Ok(())
}

/// Prints what hostile drafts cost the neighbours of their sessions.
async fn hostile_table(turns: usize) -> Result<()> {
    ensure!(turns > 0, "--turns must be at least 1");
    println!("| hostile draft | ms/token beside no draft | beside it | ratio |");
    println!("| --- | --- | --- | --- |");
    let street = Street::start().await;
    for hostility in Hostility::ALL {
        let (without, with) = street.beside(hostility, turns).await?;
        println!(
            "| {hostility:?} | {without:.3} | {with:.3} | {:.2} |",
            with / without
        );
    }
    Ok(())
}

/// Prints how rounds of sessions on one device come together.
async fn together_table(sessions: Vec<usize>, target_ms: u64, draft_ms: u64) -> Result<()> {
    println!(
        "| sessions | drafts wait for verdicts | a round, ms | sessions in a target's forward | draft forwards for one |"
    );
    println!("| --- | --- | --- | --- | --- |");
    for sessions in sessions {
        for gather in [false, true] {
            let case = together::Case {
                sessions,
                draft_length: 4,
                forwards: (
                    Duration::from_millis(target_ms),
                    Duration::from_millis(draft_ms),
                ),
                gather,
            };
            let found = together::run(case).await?;
            println!(
                "| {sessions} | {} | {:.1} | {:.1} | {:.2} |",
                if gather { "yes" } else { "no" },
                found.round_ms,
                found.sessions,
                found.draft_forwards
            );
        }
    }
    Ok(())
}

/// Prints what sessions on one prompt share.
async fn prefix_table(prompts: Vec<usize>, others: usize) -> Result<()> {
    println!(
        "| prompt | sessions | first: TTFT ms | others: p50 | longest | first / p50 | target: processed | taken over | draft: \
         processed | taken over |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for prompt in prompts {
        let shared = prefix::sessions_on(prompt, others).await?;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let median = shared.others[shared.others.len() / 2];
        println!(
            "| {prompt} | {} | {:.0} | {:.0} | {:.0} | {:.1} | {} | {} | {} | {} |",
            others + 1,
            ms(shared.first),
            ms(median),
            ms(shared.others[shared.others.len() - 1]),
            ms(shared.first) / ms(median),
            shared.target.processed,
            shared.target.taken_over,
            shared.draft.processed,
            shared.draft.taken_over,
        );
    }
    Ok(())
}
