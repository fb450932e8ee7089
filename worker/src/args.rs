//! [`ModelArgs`]: which model a worker runs, and with how much memory; [`IoArgs`]: the threads of its edge.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use specattn_engine::{DType, DeviceChoice, EngineError, LoadOptions, Model};
use specattn_hub::{HubError, Wanted};
use specattn_service::ServiceError;
use tokio::runtime::{Builder, Runtime};

use crate::gathering::Patience;
use crate::scheduler::Limits;

/// Most sessions a worker may be told to take.
const MAX_SESSIONS: u32 = 65_536;
/// Most GPUs that a model may be split over.
const MAX_RANKS: usize = 64;

/// Number type of stored KV entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvType {
    /// 32-bit float
    F32,
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
}

impl From<KvType> for DType {
    fn from(kv_type: KvType) -> Self {
        match kv_type {
            KvType::F32 => Self::F32,
            KvType::Bf16 => Self::Bf16,
            KvType::F16 => Self::F16,
        }
    }
}

/// The model, its memory, its threads, its sessions.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint folder in the Hugging Face layout, or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub
    #[arg(
        long,
        value_name = "DIR|NAME",
        required_unless_present = "random_weights",
        conflicts_with = "random_weights"
    )]
    pub model: Option<PathBuf>,

    /// For benchmarks: a model of the shape that this config.json tells, with random weights made on the device
    #[arg(long, value_name = "FILE")]
    pub random_weights: Option<PathBuf>,

    /// Memory for the KV cache, in MiB; a split model's parts share it evenly
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub kv_cache_mib: usize,

    /// Number type of KV entries [default: f32 on the CPU, which keeps greedy output equal to a float32 reference; the
    /// weights' type on a GPU]
    #[arg(long, value_enum)]
    pub kv_type: Option<KvType>,

    /// Where the model runs: auto (a GPU if there is one), cpu, cuda:N, or cuda:N,M,... for a model split over several GPUs
    #[arg(long, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Split the model over K GPUs, from --device's on: heads, MLP, vocabulary and KV cache in K equal parts [default: as many as
    /// --device lists]
    #[arg(long, value_name = "K")]
    pub tensor_parallel: Option<usize>,

    /// Share of a GPU's memory that weights and KV cache may take; the cache then gets what is left of it, whatever
    /// --kv-cache-mib says
    #[arg(long, value_name = "SHARE")]
    pub gpu_memory_utilization: Option<f32>,

    /// Folder for compiled GPU kernels [default: .cache/specattn/kernels in the home folder]
    #[arg(long, value_name = "DIR")]
    pub kernel_cache: Option<PathBuf>,

    /// Launch every kernel on its own, also where a GPU could replay a pass as a CUDA graph; for measuring
    #[arg(long, env = "SPECATTN_NO_CUDA_GRAPHS")]
    pub no_cuda_graphs: bool,

    /// Threads of the engine; 0 takes all cores
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,

    /// Most sessions at a time
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_sessions: u32,

    /// Most tokens of generating sessions in one batch, give or take one session's: it bounds the time that a batch takes
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub batch_tokens: usize,

    /// Share of the time that prompts may take while other sessions generate, between 0 and 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.5)]
    pub prefill_share: f64,

    /// Process every prompt in full, also where sessions begin alike: nobody can tell from the time to a first token what
    /// others have asked
    #[arg(long, env = "SPECATTN_NO_PREFIX_SHARING")]
    pub no_prefix_sharing: bool,

    /// For tests of slow models only: milliseconds added to every forward
    #[arg(long, value_name = "MS", default_value_t = 0, hide = true)]
    pub inject_forward_delay_ms: u64,
}

/// The threads of the gRPC edge.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Server")]
pub struct IoArgs {
    /// Threads that serve gRPC; by default one, and two on machines of eight cores and more. One is fastest for a few sessions:
    /// messages never change threads on their way. It is good for some 5,000 rounds a second
    #[arg(long, value_name = "N")]
    pub io_threads: Option<usize>,
}

/// Cores from which on a second thread takes them from nobody: rounds of many sessions come all at once, and one thread keeps
/// the models waiting for the last of them.
const CORES_FOR_TWO: usize = 8;

impl IoArgs {
    /// One thread, whatever the machine.
    pub const ONE: Self = Self {
        io_threads: Some(1),
    };

    fn threads(&self) -> usize {
        let by_default = || match std::thread::available_parallelism() {
            Ok(cores) if cores.get() >= CORES_FOR_TWO => 2,
            _ => 1,
        };
        self.io_threads.unwrap_or_else(by_default).max(1)
    }

    /// A runtime with these threads.
    ///
    /// # Errors
    /// [`ServiceError::System`] when the operating system refuses.
    pub fn runtime(&self) -> Result<Runtime, ServiceError> {
        let threads = self.threads();
        let mut builder = match threads {
            1 => Builder::new_current_thread(),
            _ => Builder::new_multi_thread(),
        };
        builder
            .worker_threads(threads)
            .enable_all()
            .build()
            .map_err(|source| ServiceError::System {
                what: "starting the runtime",
                source,
            })
    }
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A checkpoint folder, or the name of one at the hub.
    Checkpoint(PathBuf),
    /// Nowhere: random weights in the shape that this config.json tells.
    Random(PathBuf),
}

impl ModelSource {
    /// The same with a folder in place of a name, whose files are fetched where they are not in the cache.
    ///
    /// # Errors
    /// [`HubError`] when they are not to be had.
    pub fn fetched(self) -> Result<Self, HubError> {
        match self {
            Self::Checkpoint(given) => {
                specattn_hub::folder(&given, Wanted::Checkpoint).map(Self::Checkpoint)
            }
            Self::Random(config) => Ok(Self::Random(config)),
        }
    }

    /// Loads or makes the model. `progress` hears (bytes done, bytes in all) of a checkpoint.
    ///
    /// # Errors
    /// Those of [`Model::load`] and [`Model::random`].
    pub fn load(
        &self,
        options: &LoadOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Model, EngineError> {
        match self {
            Self::Checkpoint(folder) => Model::load(folder, options, progress),
            Self::Random(config) => {
                tracing::warn!(config = %config.display(), "weights are random: what this worker says means nothing");
                Model::random(config, options)
            }
        }
    }

    /// The folder where what belongs to a checkpoint lies.
    pub fn folder(&self) -> Option<&Path> {
        match self {
            Self::Checkpoint(folder) => Some(folder),
            Self::Random(_) => None,
        }
    }
}

/// [`ModelArgs`], checked.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Where the model comes from.
    pub source: ModelSource,
    /// Memory and threads.
    pub options: LoadOptions,
    /// Most sessions at a time, at least 1.
    pub max_sessions: u32,
    /// What bounds a batch.
    pub limits: Limits,
}

impl ModelArgs {
    /// The checked configuration of the model.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] names the argument that is out of range.
    pub fn config(&self) -> Result<ModelConfig, ServiceError> {
        let refuse = |argument, reason: &str| {
            Err(ServiceError::Argument {
                argument,
                reason: reason.to_owned(),
            })
        };
        let Some(kv_cache_bytes) = self.kv_cache_mib.checked_mul(1 << 20).filter(|&b| b > 0) else {
            return refuse("--kv-cache-mib", "must be positive and addressable");
        };
        if !(1..=MAX_SESSIONS).contains(&self.max_sessions) {
            return refuse("--max-sessions", "must be from 1 to 65,536");
        }
        if self
            .gpu_memory_utilization
            .is_some_and(|share| !(share > 0.0 && share <= 1.0))
        {
            return refuse("--gpu-memory-utilization", "must be in (0, 1]");
        }
        if self
            .tensor_parallel
            .is_some_and(|k| !(1..=MAX_RANKS).contains(&k))
        {
            return refuse("--tensor-parallel", "must be from 1 to 64");
        }
        if self.batch_tokens == 0 {
            return refuse("--batch-tokens", "must be at least 1");
        }
        if !(self.prefill_share > 0.0 && self.prefill_share < 1.0) {
            return refuse("--prefill-share", "must lie between 0 and 1");
        }
        let source = match (&self.model, &self.random_weights) {
            (Some(folder), None) => ModelSource::Checkpoint(folder.clone()),
            (None, Some(config)) => ModelSource::Random(config.clone()),
            _ => return refuse("--model", "either this or --random-weights names a model"),
        };
        if self.inject_forward_delay_ms > 0 {
            tracing::warn!(
                ms = self.inject_forward_delay_ms,
                "every forward is delayed on purpose"
            );
        }
        Ok(ModelConfig {
            source,
            options: LoadOptions {
                kv_cache_bytes,
                threads: self.threads,
                kv_dtype: self.kv_type.map(Into::into),
                device: self.device.clone(),
                tensor_parallel: self.tensor_parallel,
                gpu_memory_utilization: self.gpu_memory_utilization,
                kernel_cache: self.kernel_cache.clone().or_else(default_kernel_cache),
                cuda_graphs: !self.no_cuda_graphs,
                ..LoadOptions::default()
            },
            max_sessions: self.max_sessions,
            limits: Limits {
                batch_tokens: self.batch_tokens,
                prefill_share: self.prefill_share,
                share_prefixes: !self.no_prefix_sharing,
                gather: Patience::None,
                forward_delay: Duration::from_millis(self.inject_forward_delay_ms),
            },
        })
    }
}

/// Where compiled kernels are kept unless told otherwise: not in a folder that others can write to.
fn default_kernel_cache() -> Option<PathBuf> {
    Some(std::env::home_dir()?.join(".cache/specattn/kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ModelArgs {
        ModelArgs {
            model: Some("somewhere".into()),
            random_weights: None,
            kv_cache_mib: 64,
            kv_type: Some(KvType::Bf16),
            device: DeviceChoice::Cpu,
            tensor_parallel: None,
            gpu_memory_utilization: None,
            kernel_cache: None,
            no_cuda_graphs: false,
            threads: 1,
            max_sessions: 2,
            batch_tokens: 64,
            prefill_share: 0.5,
            no_prefix_sharing: false,
            inject_forward_delay_ms: 0,
        }
    }

    #[test]
    fn sizes_become_bytes() {
        let config = args().config().unwrap();
        assert_eq!(config.options.kv_cache_bytes, 64 << 20);
        assert_eq!(config.options.kv_dtype, Some(DType::Bf16));
    }

    #[test]
    fn absurd_sizes_are_refused() {
        for bad in [
            ModelArgs {
                kv_cache_mib: 0,
                ..args()
            },
            ModelArgs {
                kv_cache_mib: usize::MAX,
                ..args()
            },
            ModelArgs {
                max_sessions: 0,
                ..args()
            },
            ModelArgs {
                gpu_memory_utilization: Some(1.5),
                ..args()
            },
            ModelArgs {
                tensor_parallel: Some(0),
                ..args()
            },
            ModelArgs {
                batch_tokens: 0,
                ..args()
            },
            ModelArgs {
                prefill_share: 1.0,
                ..args()
            },
            ModelArgs {
                model: None,
                ..args()
            },
            ModelArgs {
                random_weights: Some("config.json".into()),
                ..args()
            },
        ] {
            assert_eq!(bad.config().unwrap_err().label(), "argument");
        }
    }
}
