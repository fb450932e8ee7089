//! The command line of `specattn bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::args::{Mode, ModelArgs, SamplingArgs, SpeculationArgs};
use crate::bench::lengths::Lengths;
use crate::bench::tally::LatencyTarget;
use crate::connect::ConnectArgs;

/// `specattn bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// The measurements.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Offer a gateway requests and report latencies, tokens/s and goodput
    #[command(
        long_about = "Offer a gateway requests and report latencies, tokens/s and goodput.\n\n\
            --rate is an open loop: requests come at random (Poisson) whether or not earlier ones are done, and waiting is \
            counted from the moment a request was due. --concurrency is a closed loop: so many clients, each sending its \
            next request when the last is done. Several values are measured one after the other. Without --gateway all \
            services run inside this process, on the same cores as the clients."
    )]
    Serve(Box<ServeBenchArgs>),
}

/// `specattn bench serve`.
#[derive(Debug, Args)]
pub struct ServeBenchArgs {
    /// Requests per second, arriving at random; several are measured in turn
    #[arg(
        long,
        value_name = "R",
        value_delimiter = ',',
        visible_alias = "rates",
        value_parser = rate,
        required_unless_present = "concurrency",
        conflicts_with = "concurrency"
    )]
    pub rate: Vec<f64>,

    /// Clients that always have a request running; several numbers are measured in turn
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub concurrency: Vec<u32>,

    /// Seconds measured per load
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0, value_parser = seconds)]
    pub duration: f64,

    /// Seconds of the same load before that, not measured
    #[arg(long, value_name = "SECONDS", default_value_t = 5.0, value_parser = seconds)]
    pub warmup: f64,

    /// Seconds that requests still running at the end of a load get to finish
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0, value_parser = seconds)]
    pub patience: f64,

    /// Tokens per prompt: N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, value_name = "LENGTHS", default_value = "512")]
    pub prompt_tokens: Lengths,

    /// Tokens per completion, likewise
    #[arg(long, value_name = "LENGTHS", default_value = "128")]
    pub output_tokens: Lengths,

    /// Cut prompts from these texts [default: random token ids]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub text: Vec<PathBuf>,

    /// The first N tokens of all prompts are the same
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shared_prefix: usize,

    /// Let completions end at the model's own end of text, before their length
    #[arg(long)]
    pub stop_at_eos: bool,

    /// What a good request keeps within, in milliseconds: any of ttft:MS, itl:MS (its mean time per token after the
    /// first) and e2e:MS, with commas
    #[arg(long, value_name = "TARGET")]
    pub goodput: Option<LatencyTarget>,

    /// Most requests running at a time in an open loop; what comes beyond is counted as an error
    #[arg(long, value_name = "N", default_value_t = 4096)]
    pub max_in_flight: usize,

    /// Connections that requests are spread over
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub connections: u32,

    /// How the target attends
    #[arg(long, value_enum, default_value_t = Mode::Exact)]
    pub mode: Mode,

    /// How tokens are sampled; --seed is the key of prompts, lengths and arrivals too, 0 unless given.
    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// How the draft works.
    #[command(flatten)]
    pub speculation: SpeculationArgs,

    /// Measure this gateway instead of services in this process; --target then names the folder whose tokenizer reads
    /// --text
    #[arg(long, value_name = "URL", env = "SPECATTN_GATEWAY",
        conflicts_with_all = ["draft", "random_weights", "threads", "kv_cache_mib", "kv_type", "device"])]
    pub gateway: Option<String>,

    /// What is shown to it; it must be an operator's.
    #[command(flatten)]
    pub connect: ConnectArgs,

    /// What the services of this process run.
    #[command(flatten)]
    pub models: ModelArgs,

    /// Write serve.md, serve.json and serve.svg into this folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (1e-3..=1e5).contains(&rate) => Ok(rate),
        _ => Err("a rate is a number between 0.001 and 100000".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=1e6).contains(&seconds) => Ok(seconds),
        _ => Err("seconds are a number from 0 to 1000000".to_owned()),
    }
}
