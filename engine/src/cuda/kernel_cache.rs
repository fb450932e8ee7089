//! [`KernelCache`]: CUDA C++ to machine code by NVRTC, kept in memory and on disk.
//!
//! An entry's key is everything that its machine code follows from: source, options, architecture and NVRTC's version. The
//! kernels include no header, so NVRTC's library is all that a host needs.

use std::collections::HashMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use cudarc::driver::{CudaContext, CudaFunction, sys};
use cudarc::nvrtc::{Ptx, result as nvrtc, sys as nvrtc_sys};
use sha2::{Digest, Sha256};

use super::error::CudaError;

/// What every kernel's source begins with.
const PRELUDE: &str = include_str!("kernels/prelude.cuh");

/// A kernel: an entry point of one of the source files, which may share a header with others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kernel {
    /// Name of the entry point.
    pub(super) name: &'static str,
    source: &'static str,
}

macro_rules! kernels {
    ($($constant:ident = $($file:literal)and+, $name:literal;)*) => {
        impl Kernel {
            $(pub(super) const $constant: Self = Self {
                name: $name,
                source: concat!($(include_str!(concat!("kernels/", $file))),+),
            };)*
        }
    };
}

kernels! {
    ATTENTION_DECODE = "attention_decode.cu", "attention_decode";
    ATTENTION_MERGE = "attention_merge.cu", "attention_merge";
    ATTENTION_PREFILL = "attention_prefill.cu", "attention_prefill";
    ATTENTION_PREFILL_WGMMA = "warpgroup.cuh" and "attention_prefill_wgmma.cu", "attention_prefill_wgmma";
    LINEAR = "linear.cu", "linear";
    LINEAR_WIDE = "linear_wide.cu", "linear_wide";
    LINEAR_WGMMA = "warpgroup.cuh" and "linear_wgmma.cu", "linear_wgmma";
    EMBED = "row_norm.cuh" and "elementwise.cu", "embed";
    RMS_NORM = "row_norm.cuh" and "elementwise.cu", "rms_norm";
    GATHER_ROWS = "row_norm.cuh" and "elementwise.cu", "gather_rows";
    ROTARY_ANGLES = "row_norm.cuh" and "elementwise.cu", "rotary_angles";
    ROTATE_AND_STORE = "row_norm.cuh" and "elementwise.cu", "rotate_and_store";
    GATED_SILU = "row_norm.cuh" and "elementwise.cu", "gated_silu";
    ADD_BIAS = "row_norm.cuh" and "elementwise.cu", "add_bias";
    SUM_RANKS = "row_norm.cuh" and "elementwise.cu", "sum_ranks";
    FILL_RANDOM = "row_norm.cuh" and "elementwise.cu", "fill_random";
    SCORE_PROBABILITIES = "row_norm.cuh" and "elementwise.cu", "score_probabilities";
    ENTRY_MASSES = "row_norm.cuh" and "elementwise.cu", "entry_masses";
    ADD_BIASES = "row_norm.cuh" and "elementwise.cu", "add_biases";
    ROW_ARGMAX = "row_norm.cuh" and "elementwise.cu", "row_argmax";
    PEER_SUM = "peer_sum.cu", "peer_sum";
    PEER_NORM = "row_norm.cuh" and "peer_norm.cu", "peer_norm";
    EXPAND_LISTS = "lists.cu", "expand_lists";
    MIX_ROWS = "selection.cu", "mix_rows";
    ADD_TO_MEANS = "selection.cu", "add_to_means";
    SPREAD_MEANS = "selection.cu", "spread_means";
    TOP_P = "selection.cu", "top_p";
}

/// A kernel and the options that it is compiled with.
#[derive(Debug, Clone)]
pub(super) struct Variant {
    pub(super) kernel: Kernel,
    pub(super) options: Vec<(&'static str, u32)>,
}

/// Most threads that compile at a time.
const COMPILER_THREADS: usize = 16;

/// The functions of an entry point, in the order of their options' values. Looking one up is part of every launch, so nothing is
/// allocated or hashed but the entry point's name, which is unique among the files.
type Functions = Vec<(Vec<(&'static str, u32)>, CudaFunction)>;

/// Where the function with these options is, or would be. A kernel's options have one order, so that values tell them apart.
fn place_of(functions: &Functions, options: &[(&'static str, u32)]) -> Result<usize, usize> {
    let wanted = options.iter().map(|option| option.1);
    functions.binary_search_by(|(own, _)| own.iter().map(|option| option.1).cmp(wanted.clone()))
}

/// Compiled kernels of one device.
pub(super) struct KernelCache {
    context: Arc<CudaContext>,
    architecture: String,
    /// Shared memory that a block may ask for.
    shared_bytes: i32,
    folder: Option<PathBuf>,
    functions: RwLock<HashMap<&'static str, Functions>>,
}

impl KernelCache {
    /// An empty cache that reads and writes machine code in `folder`.
    pub(super) fn new(
        context: Arc<CudaContext>,
        architecture: String,
        shared_bytes: i32,
        folder: Option<PathBuf>,
    ) -> Self {
        Self {
            context,
            architecture,
            shared_bytes,
            folder,
            functions: RwLock::default(),
        }
    }

    /// The kernel compiled with `options`, each a macro and its value.
    pub(super) fn get(
        &self,
        kernel: Kernel,
        options: &[(&'static str, u32)],
    ) -> Result<CudaFunction, CudaError> {
        if let Some(function) = self.loaded(kernel, options) {
            return Ok(function);
        }
        let image = self.image(kernel, options)?;
        self.load(kernel, options, image)
    }

    fn loaded(&self, kernel: Kernel, options: &[(&'static str, u32)]) -> Option<CudaFunction> {
        let functions = self.functions.read();
        let functions = functions.unwrap_or_else(PoisonError::into_inner);
        let of_kernel = functions.get(kernel.name)?;
        let place = place_of(of_kernel, options).ok()?;
        Some(of_kernel[place].1.clone())
    }

    /// Compiles all that is not there yet, on several threads: a host's first start takes seconds, later ones read the folder.
    pub(super) fn prepare(&self, wanted: &[Variant]) -> Result<(), CudaError> {
        let next = AtomicUsize::new(0);
        let images = Mutex::new(Vec::new());
        let work = || {
            while let Some(variant) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                let image = self.image(variant.kernel, &variant.options);
                let mut images = images.lock().unwrap_or_else(PoisonError::into_inner);
                images.push((variant, image));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..threads.min(COMPILER_THREADS) {
                scope.spawn(work);
            }
        });
        for (variant, image) in images.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.load(variant.kernel, &variant.options, image?)?;
        }
        Ok(())
    }

    /// Loads machine code, and keeps the function.
    fn load(
        &self,
        kernel: Kernel,
        options: &[(&'static str, u32)],
        image: Vec<u8>,
    ) -> Result<CudaFunction, CudaError> {
        let load = || {
            let module = self.context.load_module(Ptx::from_binary(image))?;
            let function = module.load_function(kernel.name)?;
            // Beyond 48 KiB, dynamic shared memory must be asked for; what a launch takes is still its own matter.
            let own = function.shared_size_bytes()?;
            function.set_attribute(
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                self.shared_bytes - own,
            )?;
            Ok(function)
        };
        let function: CudaFunction = load().map_err(CudaError::driver("loading a kernel"))?;
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let of_kernel = functions.entry(kernel.name).or_default();
        // Another thread may have been first. Its function stays, since graphs may launch it already.
        match place_of(of_kernel, options) {
            Ok(first) => Ok(of_kernel[first].1.clone()),
            Err(place) => {
                of_kernel.insert(place, (options.to_vec(), function.clone()));
                Ok(function)
            }
        }
    }

    /// Machine code, from the folder or from NVRTC.
    fn image(&self, kernel: Kernel, options: &[(&'static str, u32)]) -> Result<Vec<u8>, CudaError> {
        let source = format!("{PRELUDE}\n{}", kernel.source);
        let mut arguments = vec![
            format!("--gpu-architecture={}", self.architecture),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
        ];
        arguments.extend(
            options
                .iter()
                .map(|(name, value)| format!("-D{name}={value}")),
        );
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two valid places for two numbers. A failure leaves zeros, which still make a key.
        unsafe { nvrtc_sys::nvrtcVersion(&mut major, &mut minor) };
        let path = self.folder.as_ref().map(|folder| {
            let mut hasher = Sha256::new();
            for part in [&source, &arguments.join(" "), &format!("{major}.{minor}")] {
                hasher.update((part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
            let digest: String = hasher
                .finalize()
                .iter()
                .take(16)
                .map(|b| format!("{b:02x}"))
                .collect();
            folder.join(format!("{}-{digest}.cubin", kernel.name))
        });
        if let Some(image) = path
            .as_ref()
            .and_then(|p| std::fs::read(p).ok())
            .filter(|i| !i.is_empty())
        {
            return Ok(image);
        }
        let image = compile(kernel.name, &source, &arguments)?;
        if let Some(path) = path
            && let Err(error) = store(&path, &image)
        {
            tracing::debug!(%error, path = %path.display(), "compiled kernel not kept");
        }
        Ok(image)
    }
}

/// Writes under a name of its own first, so that no other process reads half a file.
fn store(path: &Path, image: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let temporary = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&temporary, image)?;
    std::fs::rename(&temporary, path)
}

fn compile(kernel: &'static str, source: &str, options: &[String]) -> Result<Vec<u8>, CudaError> {
    let fail = |log: String| CudaError::Compile {
        kernel,
        options: options.to_vec(),
        log,
    };
    let source = CString::new(source).map_err(|e| fail(e.to_string()))?;
    let program = nvrtc::create_program(&source, None).map_err(|e| fail(format!("{:?}", e.0)))?;
    // SAFETY: the program is live until destroyed below, and so is its source.
    let image = unsafe {
        nvrtc::compile_program(program, options)
            .and_then(|()| {
                let mut size = 0;
                nvrtc_sys::nvrtcGetCUBINSize(program, &mut size).result()?;
                let mut image = vec![0u8; size];
                nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
                Ok(image)
            })
            .map_err(|e| {
                let log = nvrtc::get_program_log(program).unwrap_or_default();
                let bytes: Vec<u8> = log
                    .iter()
                    .map(|&c| c as u8)
                    .take_while(|&c| c != 0)
                    .collect();
                fail(format!("{:?}: {}", e.0, String::from_utf8_lossy(&bytes)))
            })
    };
    // SAFETY: as above; not used again.
    let _ = unsafe { nvrtc::destroy_program(program) };
    image
}
