//! `simulate`: plans fleets past one machine, by running the product's decisions in virtual time.

use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use specattn_bench::simulate::cost::{Cost, Device, Shape};
use specattn_bench::simulate::fleet::Faults;
use specattn_bench::simulate::network::Network;
use specattn_bench::simulate::report::sweep;
use specattn_bench::simulate::workload::Workload;
use specattn_bench::simulate::{Plan, run};
use specattn_cli::bench::arrivals::Load;
use specattn_cli::bench::lengths::Lengths;
use specattn_cli::bench::tally::LatencyTarget;
use specattn_draft::LookaheadMode;
use specattn_gateway::{AdmissionLimits, Config};
use specattn_worker::{Limits, Patience};

/// Numbers of verify and draft workers.
#[derive(Debug, Clone, Copy)]
struct Split {
    verify: usize,
    draft: usize,
}

impl FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not VERIFY:DRAFT");
        let (verify, draft) = text.split_once(':').ok_or_else(wrong)?;
        let (verify, draft) = (verify.parse().ok(), draft.parse().ok());
        match verify.zip(draft) {
            Some((verify @ 1.., draft)) => Ok(Self { verify, draft }),
            _ => Err(wrong()),
        }
    }
}

/// Run a fleet of workers in virtual time on the product's own schedulers, sessions and assignment
#[derive(Debug, Parser)]
struct Args {
    /// Verify and draft workers, VERIFY:DRAFT; several, separated by commas, are tried in turn and compared
    #[arg(long, value_delimiter = ',', default_value = "100:100")]
    fleet: Vec<Split>,

    /// The target: llama-3-8b, llama-3.2-1b, or layers,GB of weights,GFLOP per token,KiB of KV entries per position
    #[arg(long, default_value = "llama-3-8b")]
    target: Shape,

    /// The draft, likewise
    #[arg(long, default_value = "llama-3.2-1b")]
    draft: Shape,

    /// Where targets run: h100, or GB/s,TFLOP/s,TFLOP/s of prompts,µs per layer,GB of memory
    #[arg(long, default_value = "h100")]
    target_device: Device,

    /// Where drafts run, likewise
    #[arg(long, default_value = "h100")]
    draft_device: Device,

    /// Requests per second, arriving at random
    #[arg(long, default_value_t = 1_000.0)]
    rate: f64,

    /// So many clients that are always busy, in place of a rate
    #[arg(long, conflicts_with = "rate")]
    clients: Option<u32>,

    /// Seconds in which requests come; all sessions are followed to their end
    #[arg(long, default_value_t = 100.0)]
    seconds: f64,

    /// Seconds before figures are taken
    #[arg(long, default_value_t = 10.0)]
    warmup: f64,

    /// Prompt tokens behind the shared ones: N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA
    #[arg(long, default_value = "lognormal:400,0.8")]
    prompt_tokens: Lengths,

    /// Completion tokens, likewise
    #[arg(long, default_value = "lognormal:100,0.6")]
    output_tokens: Lengths,

    /// Applications; the prompts of one begin with the same tokens
    #[arg(long, default_value_t = 200)]
    applications: u32,

    /// Tokens they share
    #[arg(long, default_value_t = 512)]
    shared_tokens: usize,

    /// Tokens per round; left out: up to four, and none while drafts do not pay
    #[arg(long)]
    draft_length: Option<u32>,

    /// Share of tokens on which draft and target agree
    #[arg(long, default_value_t = 0.75)]
    agreement: f64,

    /// Whether drafts run ahead of verdicts
    #[arg(long, value_enum, default_value = "auto")]
    lookahead: LookaheadMode,

    /// Most sessions of a worker
    #[arg(long, default_value_t = 64)]
    max_sessions: u32,

    /// Requests that may wait for a place
    #[arg(long, default_value_t = 256)]
    max_queued: usize,

    /// Microseconds of a message between any two processes
    #[arg(long, default_value_t = 150)]
    delay_us: u64,

    /// Microseconds on top between drafts and verify workers
    #[arg(long, default_value_t = 0)]
    draft_delay_us: u64,

    /// Mean microseconds on top of both, exponentially distributed
    #[arg(long, default_value_t = 50)]
    jitter_us: u64,

    /// Mean seconds that a worker lives; 0: nobody dies
    #[arg(long, default_value_t = 0.0)]
    mean_life: f64,

    /// Milliseconds until a death is noticed
    #[arg(long, default_value_t = 2_800)]
    notice_ms: u64,

    /// Milliseconds until another worker is in a dead one's place
    #[arg(long, default_value_t = 20_000)]
    repair_ms: u64,

    /// What a good request keeps within, as in `specattn bench serve`
    #[arg(long, default_value = "ttft:1000,itl:50")]
    goodput: LatencyTarget,

    /// Key of everything random
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Print JSON, an array of one object per fleet, instead of tables
    #[arg(long)]
    json: bool,
}

impl Args {
    fn plan(&self, split: Split) -> Plan {
        let places = split.verify * self.max_sessions as usize;
        let gateway = Config {
            admission: AdmissionLimits {
                sessions: places,
                sessions_per_client: places,
                queued: self.max_queued,
                queue_timeout: Duration::from_secs(10),
            },
            ..Config::new("")
        };
        Plan {
            verify: (
                split.verify,
                Cost {
                    device: self.target_device,
                    shape: self.target,
                },
            ),
            draft: (
                split.draft,
                Cost {
                    device: self.draft_device,
                    shape: self.draft,
                },
            ),
            agreement: self.agreement,
            max_sessions: self.max_sessions,
            limits: Limits {
                batch_tokens: 512,
                prefill_share: 0.5,
                share_prefixes: true,
                gather: Patience::None,
                forward_delay: Duration::ZERO,
            },
            draft_timeout: Duration::from_millis(100),
            lookahead: self.lookahead,
            gateway,
            network: Network {
                delay: Duration::from_micros(self.delay_us),
                between_roles: Duration::from_micros(self.draft_delay_us),
                jitter: Duration::from_micros(self.jitter_us),
            },
            faults: (self.mean_life > 0.0).then(|| Faults {
                mean_life: Duration::from_secs_f64(self.mean_life),
                notice: Duration::from_millis(self.notice_ms),
                repair: Duration::from_millis(self.repair_ms),
            }),
            workload: Workload {
                load: self
                    .clients
                    .map_or(Load::Rate(self.rate), Load::Concurrency),
                until: Duration::from_secs_f64(self.seconds),
                prompt_tokens: self.prompt_tokens,
                output_tokens: self.output_tokens,
                applications: self.applications,
                shared_tokens: self.shared_tokens,
                draft_length: self.draft_length,
                seed: self.seed,
            },
            target: self.goodput,
            warmup: Duration::from_secs_f64(self.warmup.min(self.seconds / 2.0)),
        }
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let style = ProgressStyle::with_template("{msg} [{bar:32}] {percent} %, {eta} left")?;
    let mut reports = Vec::new();
    for &split in &args.fleet {
        let bar = ProgressBar::new(1_000)
            .with_style(style.clone())
            .with_message(format!("{}:{}", split.verify, split.draft));
        let report = run(&args.plan(split), &mut |share| {
            bar.set_position((1e3 * share) as u64);
        })?;
        bar.finish_and_clear();
        reports.push(report);
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    } else if let [report] = &reports[..] {
        print!("{}", report.markdown());
    } else {
        print!("{}", sweep(&reports));
    }
    let mut code = ExitCode::SUCCESS;
    for report in &reports {
        if let Err(fault) = report.check() {
            eprintln!("{fault}");
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}
