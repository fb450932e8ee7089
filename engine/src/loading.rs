//! From a checkpoint to something that runs forwards: one transformer, or one per rank of a split model.

use std::path::PathBuf;

use crate::backend::{Backend, DType, KvShape};
use crate::communicator::Communicator;
use crate::cpu::{CpuBackend, Isa as CpuIsa, ThreadGroup};
use crate::crew::Crew;
use crate::device::{DeviceChoice, DeviceInfo, cpu_devices};
use crate::error::EngineError;
use crate::kv_cache::BLOCK_TOKENS;
use crate::model::Forwards;
use crate::ranks::Ranks;
use crate::share::Share;
use crate::transformer::{Parts, Place, Transformer};
use crate::weights::{WeightSource, Weights};

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// KV cache budget in bytes, over all ranks; memory is touched as it is used.
    pub kv_cache_bytes: usize,
    /// Worker threads; 0 takes all cores. Models of one process share one pool.
    pub threads: usize,
    /// What KV entries are stored as. `None` takes f32 on the CPU, which keeps greedy output equal to an f32 reference, and the
    /// weights' type on a GPU, which knows no other.
    pub kv_dtype: Option<DType>,
    /// Which of [`CpuIsa::available`] to run; `None` takes the best.
    pub cpu_isa: Option<CpuIsa>,
    /// Where the model runs.
    pub device: DeviceChoice,
    /// Ranks that the model is split over. `None`: as many as the device choice lists GPUs, one on a CPU.
    pub tensor_parallel: Option<usize>,
    /// On GPUs, the share of each one's memory that everything in use may come to once the KV cache is made; it then takes the place of
    /// `kv_cache_bytes`.
    pub gpu_memory_utilization: Option<f32>,
    /// Folder for compiled GPU kernels.
    pub kernel_cache: Option<PathBuf>,
    /// Whether GPUs may replay passes as CUDA graphs. A model that asks for none turns them off for all models on its GPUs.
    pub cuda_graphs: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            kv_cache_bytes: 1 << 30,
            threads: 0,
            kv_dtype: None,
            cpu_isa: None,
            device: DeviceChoice::Cpu,
            tensor_parallel: None,
            gpu_memory_utilization: None,
            kernel_cache: None,
            cuda_graphs: true,
        }
    }
}

/// A model ready to run.
pub(crate) struct Loaded {
    pub(crate) forwards: Box<dyn Forwards>,
    /// KV blocks, on every rank.
    pub(crate) num_blocks: usize,
    pub(crate) kv_dtype: DType,
    /// One per rank.
    pub(crate) devices: Vec<DeviceInfo>,
}

/// Loads a model. `progress` hears (bytes done, bytes in all).
///
/// # Errors
/// As [`crate::Model::load`].
pub(crate) fn load(
    source: &WeightSource<'_>,
    options: &LoadOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Loaded, EngineError> {
    let device = options.device.for_ranks(options.tensor_parallel)?;
    let ranks = match &device {
        DeviceChoice::Cuda(numbers) => numbers.len(),
        _ => options.tensor_parallel.unwrap_or(1),
    };
    let shares = Share::all(ranks, source.config())?;
    let loading = |default| Loading {
        source,
        options,
        kv_dtype: options.kv_dtype.unwrap_or(default),
    };
    match &device {
        DeviceChoice::Cpu | DeviceChoice::Auto => {
            let ends = cpu_ranks(ranks, options)?;
            loading(DType::F32).run(shares, ends, cpu_devices(ranks), progress)
        }
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(numbers) => {
            let half = source.half_type()?;
            let gpus = crate::cuda::open(numbers, options)?;
            let ends = crate::cuda::ranks(gpus, half)?;
            let devices = crate::cuda::describe(numbers)?;
            loading(half).run(shares, ends, devices, progress)
        }
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Err(EngineError::Unsupported(
            "a GPU: this build has no GPU support".to_owned(),
        )),
    }
}

/// Backends on the CPU, and what joins them.
fn cpu_ranks(
    ranks: usize,
    options: &LoadOptions,
) -> Result<Vec<(CpuBackend, Group<CpuBackend>)>, EngineError> {
    let (threads, isa) = (options.threads, options.cpu_isa);
    if ranks == 1 {
        return Ok(vec![(CpuBackend::new(threads, isa)?, None)]);
    }
    let boxed = |end| Some(Box::new(end) as Box<dyn Communicator<CpuBackend>>);
    let group = ThreadGroup::new(ranks).into_iter().map(boxed);
    let backends = CpuBackend::ranks(ranks, threads, isa)?;
    Ok(backends.into_iter().zip(group).collect())
}

/// A rank's end of its group; `None` for a model that is not split.
pub(crate) type Group<B> = Option<Box<dyn Communicator<B>>>;

/// A rank's backend and its weights there.
type Held<B> = (B, Weights<<B as Backend>::Weight>);

/// What is the same for all ranks.
#[derive(Clone, Copy)]
struct Loading<'a> {
    source: &'a WeightSource<'a>,
    options: &'a LoadOptions,
    kv_dtype: DType,
}

impl Loading<'_> {
    /// Brings each share to its backend: the weights of all ranks at once, then as many KV blocks as the fullest device takes,
    /// since what weights leave of a GPU is known then.
    fn run<B>(
        self,
        shares: Vec<Share>,
        ends: Vec<(B, Group<B>)>,
        devices: Vec<DeviceInfo>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Loaded, EngineError>
    where
        B: Backend,
        Transformer<B>: Send + 'static,
    {
        let (backends, groups): (Vec<B>, Vec<_>) = ends.into_iter().unzip();
        let ranks = self.weights(&shares, backends, progress)?;
        let (of, mut num_blocks) = (shares.len(), usize::MAX);
        for (share, (backend, _)) in shares.iter().zip(&ranks) {
            let budget = kv_budget(backend, self.options, of)?;
            let block = block_bytes(&self.kv_shape(*share, 0));
            num_blocks = num_blocks.min(budget / block);
            if num_blocks == 0 {
                return Err(EngineError::InvalidArgument {
                    what: "KV cache budget",
                    reason: format!("{budget} bytes hold no block of {block} bytes"),
                });
            }
        }
        let mut transformers = Vec::new();
        for ((share, group), (backend, weights)) in shares.into_iter().zip(groups).zip(ranks) {
            let parts = Parts {
                kv: backend.kv(self.kv_shape(share, num_blocks))?,
                backend,
                weights,
                config: self.source.config().clone(),
                place: Place { share, group },
                crew: Crew::new(self.options.threads),
            };
            transformers.push(Transformer::new(parts)?);
        }
        let forwards: Box<dyn Forwards> = match (transformers.pop(), transformers.is_empty()) {
            (Some(only), true) => Box::new(only),
            (last, _) => {
                transformers.extend(last);
                Box::new(Ranks::new(transformers)?)
            }
        };
        Ok(Loaded {
            forwards,
            num_blocks,
            kv_dtype: self.kv_dtype,
            devices,
        })
    }

    /// Every rank's weights beside its backend. The first rank tells its progress for all.
    fn weights<B>(
        self,
        shares: &[Share],
        backends: Vec<B>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Held<B>>, EngineError>
    where
        B: Backend,
        B::Weight: Send,
    {
        let load = |backend: B, share: Share, progress: &mut dyn FnMut(u64, u64)| {
            let weights = Weights::load(&backend, self.source, share, progress)?;
            Ok((backend, weights))
        };
        std::thread::scope(|scope| {
            let mut backends = backends.into_iter().zip(shares);
            let first = backends.next();
            let others: Vec<_> = backends
                .map(|(backend, share)| scope.spawn(|| load(backend, *share, &mut |_, _| {})))
                .collect();
            let first = first.map(|(backend, share)| load(backend, *share, progress));
            let others = others.into_iter().map(|rank| {
                rank.join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            first.into_iter().chain(others).collect()
        })
    }

    fn kv_shape(&self, share: Share, num_blocks: usize) -> KvShape {
        let attention = share.attention(self.source.config());
        KvShape {
            num_layers: self.source.config().num_layers,
            num_kv_heads: attention.num_kv_heads,
            head_dim: attention.head_dim,
            num_blocks,
            dtype: self.kv_dtype,
        }
    }
}

/// Bytes for one rank's part of the KV cache.
fn kv_budget<B: Backend>(
    backend: &B,
    options: &LoadOptions,
    ranks: usize,
) -> Result<usize, EngineError> {
    let (Some(share), Some((free, total))) =
        (options.gpu_memory_utilization, backend.device_memory()?)
    else {
        return Ok(options.kv_cache_bytes / ranks);
    };
    if !(share > 0.0 && share <= 1.0) {
        return Err(EngineError::InvalidArgument {
            what: "GPU memory utilization",
            reason: format!("{share} is not in (0, 1]"),
        });
    }
    let allowed = (total as f64 * f64::from(share)) as usize;
    Ok(allowed.saturating_sub(total - free))
}

/// Bytes of one KV block over all layers of a rank; every backend pads heads to a multiple of 16.
fn block_bytes(shape: &KvShape) -> usize {
    let entry = 2 * shape.head_dim.next_multiple_of(16) * shape.dtype.bytes();
    shape.num_layers * shape.num_kv_heads * BLOCK_TOKENS * entry
}
