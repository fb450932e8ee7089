//! The command line.

mod request;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use specattn_engine::DeviceChoice;
use specattn_gateway::{AccessArgs, HttpArgs, LogArgs};
use specattn_service::args::{ServerArgs, TelemetryArgs, TraceArgs};
use specattn_worker::args::{IoArgs, KvType};

use crate::align::AlignArgs;
use crate::bench::BenchArgs;
use crate::catalog::ModelsArgs;
use crate::connect::ConnectArgs;
use crate::eval::EvalArgs;
use crate::key::KeyArgs;

pub use request::{Mode, SamplingArgs, SpeculationArgs, StopArgs};

/// Speculative decoding in which the draft model tells the target model what to attend to.
#[derive(Debug, Parser)]
#[command(name = "specattn", version = specattn_proto::version::build(), max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a text
    #[command(
        long_about = "Continue a text, streaming it to standard output.\n\n\
            Without --gateway all three services (gateway, verify worker, draft worker) run inside this process and talk \
            over loopback gRPC, with the bundled pair of models. The last line, on standard error, tells what it cost.",
        after_long_help = "Exit codes: 0 done, 1 failed, 64 bad usage, 130 interrupted.",
        mut_arg("log_level", |arg| arg.default_value("warn"))
    )]
    Generate(Box<GenerateArgs>),
    /// Continue to read a session from the gateway, after its client or the gateway itself died
    #[command(
        long_about = "Continue to read a session, after its client or the gateway itself died.\n\n\
            The gateway delivers what is committed and goes on from there; a gateway with a session log (--log-dir) does so \
            after its own death too, and for sessions of dead gateways on the same folder.",
        mut_arg("log_level", |arg| arg.default_value("warn"))
    )]
    Resume(ResumeArgs),
    /// Run gateway, verify worker and draft worker in one process until stopped
    #[command(
        long_about = "Run gateway, verify worker and draft worker in one process.\n\n\
            Prints the gateway's URL on standard output once it takes requests, and stays up. SIGTERM and Ctrl-C drain it: \
            running generations get --drain-timeout-ms to end.",
        mut_arg("listen", |arg| arg.required(false).default_value(DEFAULT_LISTEN))
    )]
    Serve(ServeArgs),
    /// Show workers, load and sessions of a running gateway
    Status(StatusArgs),
    /// Watch workers and sessions of a running gateway; prints tables where standard output is no terminal
    Top(TopArgs),
    /// List pairs of models that go together, and their layer maps
    Models(ModelsArgs),
    /// Fit the layer map of a pair of models on calibration text
    #[command(
        long_about = "Fit the layer map of a pair of models on calibration text.\n\n\
            Records the attention of both models on the same text and finds, for each KV head of the target, the mixture of \
            draft heads that is closest to it. Writes alignment.json beside the target, where a verify worker finds it."
    )]
    Align(AlignArgs),
    /// Measure what masks cost in quality, beside other methods at the same budget
    #[command(
        long_about = "Measure what masks cost in quality, beside other methods at the same budget.\n\n\
            Reads long texts teacher-forced, exactly as served: a dense prompt, then rounds of draft steps, masks and masked \
            target forwards, whose KV entries stay. Reports mean KL to the dense target, top-1 agreement, perplexity, KV \
            entries kept and mask bytes."
    )]
    Eval(EvalArgs),
    /// Measure a running system, or one in this process, from a client's seat
    Bench(BenchArgs),
    /// Tell by the exit code whether a service takes requests
    Health(HealthArgs),
    /// Make API keys for clients, and secrets for workers
    Key(KeyArgs),
}

/// Where `serve` listens unless told otherwise.
const DEFAULT_LISTEN: &str = "127.0.0.1:7400";

/// `specattn generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The text to continue
    #[arg(
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    pub prompt: Option<String>,

    /// Read the text to continue from a file, as it is; - is standard input
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,

    /// Generate at most this many tokens
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_tokens: u32,

    /// How the target attends: sparse reads only the KV entries that the draft's masks select, which is approximate;
    /// dense reads all of them and gives exactly the target's distribution; exact reads sparsely and confirms many tokens
    /// at a time by a dense pass, which gives exactly the target's distribution too
    #[arg(long, value_enum, default_value_t = Mode::Exact)]
    pub mode: Mode,

    /// How tokens are sampled.
    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Where generation stops.
    #[command(flatten)]
    pub stop: StopArgs,

    /// How the draft works.
    #[command(flatten)]
    pub speculation: SpeculationArgs,

    /// Use this gateway instead of starting the services in this process
    #[arg(long, value_name = "URL", env = "SPECATTN_GATEWAY",
        conflicts_with_all = ["target", "draft", "random_weights", "threads", "kv_cache_mib", "kv_type", "device"])]
    pub gateway: Option<String>,

    /// What is shown to it.
    #[command(flatten)]
    pub connect: ConnectArgs,

    /// What the services of this process run.
    #[command(flatten)]
    pub models: ModelArgs,

    /// Print one JSON object at the end instead of the streamed text
    #[arg(long)]
    pub json: bool,

    /// Show neither progress nor the closing line
    #[arg(short, long)]
    pub quiet: bool,

    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// What the services of this process run.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Models")]
pub struct ModelArgs {
    /// Target model: a Hugging Face checkpoint folder, or ORG/NAME or ORG/NAME@REVISION of the hub [default: the bundled one]
    #[arg(long, value_name = "DIR|NAME", env = "SPECATTN_TARGET")]
    pub target: Option<PathBuf>,

    /// Draft model, likewise, with the target's tokenizer [default: the bundled one when --target is not given, else none]
    #[arg(long, value_name = "DIR|NAME", env = "SPECATTN_DRAFT")]
    pub draft: Option<PathBuf>,

    /// For benchmarks: a target of the shape that this config.json tells, with random weights made on the device, and no
    /// draft; text is tokenized as for --target, or for the bundled one
    #[arg(
        long,
        value_name = "FILE",
        env = "SPECATTN_RANDOM_WEIGHTS",
        conflicts_with = "draft"
    )]
    pub random_weights: Option<PathBuf>,

    /// For benchmarks: a draft likewise, beside such a target; a bias on logits makes the two agree
    #[arg(
        long,
        value_name = "FILE",
        env = "SPECATTN_RANDOM_DRAFT_WEIGHTS",
        requires = "random_weights"
    )]
    pub random_draft_weights: Option<PathBuf>,

    /// Threads to calculate with; 0 takes all cores
    #[arg(long, value_name = "N", env = "SPECATTN_THREADS", default_value_t = 0)]
    pub threads: usize,

    /// Memory for each model's KV cache in MiB
    #[arg(
        long,
        value_name = "MIB",
        env = "SPECATTN_KV_CACHE_MIB",
        default_value_t = 512
    )]
    pub kv_cache_mib: usize,

    /// Memory for the draft's KV cache in MiB, where it is to be another [default: as --kv-cache-mib]
    #[arg(long, value_name = "MIB", env = "SPECATTN_DRAFT_KV_CACHE_MIB")]
    pub draft_kv_cache_mib: Option<usize>,

    /// Number type of KV entries [default: on the CPU f32, with which greedy text equals a float32 reference; on a GPU the
    /// weights' type]
    #[arg(long, value_enum, value_name = "TYPE", env = "SPECATTN_KV_TYPE")]
    pub kv_type: Option<KvType>,

    /// Where the models run: auto (a GPU if there is one), cpu, cuda:N, or cuda:N,M,... for a target split over several GPUs, whose
    /// first is then the draft's [default: auto]
    #[arg(long, value_name = "DEVICE", env = "SPECATTN_DEVICE")]
    pub device: Option<DeviceChoice>,

    /// Where the draft runs [default: --device's first]
    #[arg(long, value_name = "DEVICE", env = "SPECATTN_DRAFT_DEVICE")]
    pub draft_device: Option<DeviceChoice>,

    /// Split the target over K GPUs, from --device's on [default: as many as --device lists]
    #[arg(long, value_name = "K", env = "SPECATTN_TENSOR_PARALLEL")]
    pub tensor_parallel: Option<usize>,
}

impl ModelArgs {
    /// Where the draft runs; `None` leaves it to the draft worker.
    pub fn draft_device(&self) -> Option<DeviceChoice> {
        let first = || self.device.as_ref().map(DeviceChoice::first);
        self.draft_device.clone().or_else(first)
    }

    /// Whether both models compute on the same device, or on the host's cores.
    pub fn share_a_device(&self) -> bool {
        let decided = |device: Option<DeviceChoice>| device.unwrap_or(DeviceChoice::Auto).decided();
        let target = decided(self.device.as_ref().map(DeviceChoice::first));
        target == decided(self.draft_device())
    }
}

/// `specattn serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// What to run.
    #[command(flatten)]
    pub models: ModelArgs,

    /// Run no draft worker; others may still register
    #[arg(long, conflicts_with = "draft")]
    pub no_draft: bool,

    /// Process every prompt in full, also where sessions begin alike
    #[arg(long, env = "SPECATTN_NO_PREFIX_SHARING")]
    pub no_prefix_sharing: bool,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,

    /// What the HTTP API says and takes.
    #[command(flatten)]
    pub http: HttpArgs,

    /// The durable log of sessions.
    #[command(flatten)]
    pub log: LogArgs,

    /// Who may use the gateway.
    #[command(flatten)]
    pub access: AccessArgs,

    /// Where the gateway listens; the workers take free loopback ports.
    #[command(flatten)]
    pub server: ServerArgs,

    /// Threads of all three servers.
    #[command(flatten)]
    pub io: IoArgs,

    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,

    /// Where traces go.
    #[command(flatten)]
    pub traces: TraceArgs,
}

impl ServeArgs {
    /// Where the gateway listens.
    pub fn listen(&self) -> SocketAddr {
        self.server.listen
    }
}

/// A running gateway.
#[derive(Debug, Args)]
pub struct GatewayArgs {
    /// The gateway to ask
    #[arg(
        long = "gateway",
        value_name = "URL",
        env = "SPECATTN_GATEWAY",
        default_value = "http://127.0.0.1:7400"
    )]
    pub url: String,

    /// What is shown to it.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// `specattn resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The session, as the gateway's log and `specattn generate --json` name it
    #[arg(value_name = "ID")]
    pub session_id: String,

    /// Begin with this token of the completion, the first being 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub from: u64,

    /// The gateway to ask.
    #[command(flatten)]
    pub gateway: GatewayArgs,

    /// Print one JSON object at the end instead of the streamed text
    #[arg(long)]
    pub json: bool,

    /// Show no closing line
    #[arg(short, long)]
    pub quiet: bool,

    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// `specattn health`.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// The service: a gateway or a worker
    #[arg(value_name = "URL", default_value = "http://127.0.0.1:7400")]
    pub url: String,

    /// What is shown to it.
    #[command(flatten)]
    pub connect: ConnectArgs,
}

/// `specattn status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The gateway to ask.
    #[command(flatten)]
    pub gateway: GatewayArgs,

    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// `specattn top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The gateway to ask.
    #[command(flatten)]
    pub gateway: GatewayArgs,

    /// Milliseconds between two looks
    #[arg(long, value_name = "MS", default_value_t = 1_000)]
    pub interval_ms: u64,

    /// Where standard output is no terminal: end after so many tables [default: never]
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"specattn").chain(line))
    }

    fn generate(line: &[&str]) -> GenerateArgs {
        match parse(line).unwrap().command {
            Command::Generate(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn generate_has_the_documented_flags_and_defaults() {
        let args = generate(&["generate", "Once"]);
        assert_eq!(args.prompt.as_deref(), Some("Once"));
        assert_eq!(args.mode, Mode::Exact);
        assert_eq!(args.sampling.temperature, 0.0);
        assert_eq!(args.telemetry.log_level, "warn");
        let line = "generate --prompt-file - --max-tokens 7 --mode dense --temperature 0.8 --top-k 40 --top-p 0.9 \
            --seed 3 --draft-length 8 --mask-p 0.9 --target t --draft d --json --stop a --stop b --stop-token 5 \
            --min-p 0.1 --presence-penalty -1 --frequency-penalty 0.5 --repetition-penalty 1.1 --sink 1 --window 2 \
            --granularity 4 --confirm-length 16 --refresh-every 32 --max-kl 0.01 --ignore-eos --threads 2 --kv-cache-mib 64 --deadline-ms 100 --quiet";
        let args = generate(&line.split_whitespace().collect::<Vec<_>>());
        assert_eq!(args.stop.stop, ["a", "b"]);
        assert_eq!(args.sampling.presence_penalty, -1.0);
        assert_eq!(args.speculation.draft_length, Some(8));
    }

    #[test]
    fn contradictions_are_refused() {
        for line in [
            &["generate"][..],
            &["generate", "a", "--prompt-file", "b"],
            &["generate", "a", "--no-draft", "--draft-length", "4"],
            &["generate", "a", "--gateway", "http://x:1", "--target", "t"],
            &["generate", "a", "--mode", "both"],
            &["generate", "a", "--temperature", "hot"],
            &["serve", "--listen", "nowhere"],
            &[],
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn serve_has_the_gateways_port_and_logs() {
        match parse(&["serve"]).unwrap().command {
            Command::Serve(args) => {
                assert_eq!(args.listen().to_string(), DEFAULT_LISTEN);
                assert_eq!(args.telemetry.log_level, "info");
            }
            other => panic!("{other:?}"),
        }
    }
}
