//! [`CudaError`]: what can go wrong between this process and a GPU.

use cudarc::cublas::result::CublasError;
use cudarc::driver::DriverError;

/// A GPU failure. [`CudaError::label`] gives a short name for metrics.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// A library of NVIDIA's is not installed.
    #[error("{library} is not installed: {needed_for}")]
    LibraryMissing {
        /// Its file name.
        library: &'static str,
        /// What it would be needed for.
        needed_for: &'static str,
    },
    /// The machine has no GPU of that number.
    #[error("no GPU number {ordinal}: this machine has {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// GPUs present.
        count: usize,
    },
    /// The GPU lacks what the kernels use.
    #[error(
        "{name} has compute capability {major}.{minor} and {} KiB of shared memory per block; the kernels need 8.0 and 217 KiB, \
         which an H100 and later GPUs of data centres have: --device cpu does without",
        shared_bytes >> 10
    )]
    UnsupportedArchitecture {
        /// The GPU's name.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
        /// Shared memory that a block may ask for.
        shared_bytes: i32,
    },
    /// A kernel does not compile: a defect, or an NVRTC too old for the GPU.
    #[error("cannot compile kernel {kernel} with {options:?}: {log}")]
    Compile {
        /// Its name.
        kernel: &'static str,
        /// NVRTC's options.
        options: Vec<String>,
        /// NVRTC's words.
        log: String,
    },
    /// Not enough device memory.
    #[error("GPU memory exhausted: {wanted} bytes wanted, {free} of {total} free")]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free.
        free: usize,
        /// Bytes of the GPU.
        total: usize,
    },
    /// The driver refused a call, or the GPU failed while it ran an earlier one.
    #[error("GPU failure while {what}: {}", driver_word(.source))]
    Driver {
        /// What was tried.
        what: &'static str,
        /// The driver's word.
        source: DriverError,
    },
    /// NCCL failed.
    #[error("NCCL failed while {what}: {why}")]
    Nccl {
        /// What was tried.
        what: &'static str,
        /// NCCL's word.
        why: String,
    },
    /// NVLink multicast must be decided on before the process has threads.
    #[error("NCCL_NVLS_ENABLE is not set; set it to 0, which keeps NVLink multicast off")]
    MulticastUndecided,
    /// A rank of the split model failed, now or earlier, and the others cannot go on without it.
    #[error("a rank of the split model has failed; the worker must be started again")]
    RankLeft,
    /// cuBLAS refused a product.
    #[error("cuBLAS failed: {0:?}")]
    Cublas(CublasError),
}

impl CudaError {
    /// A short stable name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::LibraryMissing { .. } => "cuda_library_missing",
            Self::NoDevice { .. } => "cuda_no_device",
            Self::UnsupportedArchitecture { .. } => "cuda_unsupported",
            Self::Compile { .. } => "cuda_compile",
            Self::OutOfMemory { .. } => "cuda_out_of_memory",
            Self::Driver { .. } => "cuda_driver",
            Self::Nccl { .. } => "nccl",
            Self::MulticastUndecided => "nccl_multicast_undecided",
            Self::RankLeft => crate::error::RANK_LEFT,
            Self::Cublas(_) => "cublas",
        }
    }

    /// For `map_err`: a driver call that failed while doing `what`.
    pub(super) fn driver(what: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |source| Self::Driver { what, source }
    }
}

fn driver_word(error: &DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}
