//! [`Device`]: one GPU, its stream, its kernels, and the first failure met on it.
//!
//! All work of a device goes down one stream, in order; nothing waits for it but reads. Calls inside a forward return nothing:
//! the first failure is kept and reported by the read that ends the forward, as the driver itself does with asynchronous
//! failures. Launches of a forward may be held back to go as one graph ([`Recorder`]).

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use cudarc::cublas::sys as cublas;
use cudarc::driver::{CudaContext, CudaFunction, CudaStream, DriverError, sys};

use super::error::CudaError;
use super::graph_cache::GraphCounts;
use super::kernel_cache::{Kernel, KernelCache, Variant};
use super::pinned::PinnedMemory;
use super::recorder::Recorder;
use super::recording::{Arguments, LaunchShape};
use super::turnstile::{Turnstile, UserId};

/// Shared memory that a block asks for, at most, in the kernels that every GPU runs; Hopper's own take 225 KiB.
const SHARED_BYTES: i32 = 217 << 10;

/// A GPU that is ready for use.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Dropped before the kernels that its graphs launch.
    recorder: Mutex<Recorder>,
    kernels: KernelCache,
    cublas: cublas::cublasHandle_t,
    multiprocessors: u32,
    has_warpgroups: bool,
    failure: Mutex<Option<CudaError>>,
    turn: Turnstile,
}

// SAFETY: the cuBLAS handle and the recorder's functions and graphs are all that is not Send of itself; the driver's and cuBLAS's
// handles may move between threads.
unsafe impl Send for Device {}
// SAFETY: every use of the cuBLAS handle happens in a turn, which one thread has at a time; the recorder is behind a mutex.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// The right to use the device, until dropped.
#[derive(Debug)]
pub struct Turn(Arc<Device>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.recorder().end();
        self.0.turn.leave();
    }
}

/// Whether the driver knows tensor copies (CUDA 12), which the kernels of warpgroup instructions use.
fn describes_tensors() -> bool {
    let mut version = 0;
    // SAFETY: a valid place for a number.
    let asked = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    asked.result().is_ok() && version >= 12_000
}

/// How many GPUs this machine has; 0 without a driver.
pub fn device_count() -> usize {
    // SAFETY: only tries to load the driver's library.
    if !unsafe { sys::is_culib_present() } || cudarc::driver::result::init().is_err() {
        return 0;
    }
    CudaContext::device_count().map_or(0, |n| usize::try_from(n).unwrap_or(0))
}

impl Device {
    /// Opens GPU number `ordinal`. Compiled kernels are kept in `kernel_cache`; without one they are compiled anew.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`], [`CudaError::NoDevice`] or [`CudaError::UnsupportedArchitecture`].
    pub fn open(ordinal: usize, kernel_cache: Option<PathBuf>) -> Result<Arc<Self>, CudaError> {
        // SAFETY: these only try to load libraries.
        let libraries = unsafe {
            [
                (
                    sys::is_culib_present(),
                    "libcuda.so",
                    "it comes with the GPU's driver",
                ),
                (
                    cudarc::nvrtc::sys::is_culib_present(),
                    "libnvrtc.so",
                    "it compiles the kernels; put CUDA's lib folder on LD_LIBRARY_PATH",
                ),
                (
                    cublas::is_culib_present(),
                    "libcublas.so",
                    "it multiplies large matrices; put CUDA's lib folder on LD_LIBRARY_PATH",
                ),
            ]
        };
        for (present, library, needed_for) in libraries {
            if !present {
                return Err(CudaError::LibraryMissing {
                    library,
                    needed_for,
                });
            }
        }
        let count = device_count();
        if ordinal >= count {
            return Err(CudaError::NoDevice { ordinal, count });
        }
        let driver = CudaError::driver("opening the GPU");
        let open = || {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: one stream does all work, so nothing needs events to be ordered.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream()?;
            let count = context
                .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            let shared_bytes = context.attribute(
                sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?;
            Ok((
                stream,
                shared_bytes,
                context.compute_capability()?,
                context.name()?,
                count,
                context,
            ))
        };
        let (stream, shared_bytes, (major, minor), name, multiprocessors, context) =
            open().map_err(driver)?;
        if major < 8 || shared_bytes < SHARED_BYTES {
            return Err(CudaError::UnsupportedArchitecture {
                name,
                major,
                minor,
                shared_bytes,
            });
        }
        let handle = cudarc::cublas::result::create_handle().map_err(CudaError::Cublas)?;
        // SAFETY: both handles are live; cuBLAS's stream type is the driver's.
        unsafe { cudarc::cublas::result::set_stream(handle, stream.cu_stream().cast()) }
            .map_err(CudaError::Cublas)?;
        // Hopper's own instructions need the target with an `a`.
        let architecture = format!("sm_{major}{minor}{}", if major == 9 { "a" } else { "" });
        let recorder = Recorder::new(&context, &stream, major >= 9)
            .map_err(CudaError::driver("opening the GPU"))?;
        Ok(Arc::new(Self {
            recorder: Mutex::new(recorder),
            kernels: KernelCache::new(
                Arc::clone(&context),
                architecture,
                shared_bytes,
                kernel_cache,
            ),
            context,
            stream,
            cublas: handle,
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1),
            has_warpgroups: major == 9 && describes_tensors(),
            failure: Mutex::new(None),
            turn: Turnstile::default(),
        }))
    }

    /// The process's handle of GPU number `ordinal`, opened on first use: its models share kernels and take turns.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn shared(ordinal: usize, kernel_cache: Option<PathBuf>) -> Result<Arc<Self>, CudaError> {
        static OPEN: Mutex<Vec<(usize, Weak<Device>)>> = Mutex::new(Vec::new());
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, device)| device.strong_count() > 0);
        let known = open.iter().find(|(number, _)| *number == ordinal);
        if let Some(device) = known.and_then(|(_, device)| device.upgrade()) {
            return Ok(device);
        }
        let device = Self::open(ordinal, kernel_cache)?;
        open.push((ordinal, Arc::downgrade(&device)));
        Ok(device)
    }

    /// The GPU's name.
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_else(|_| "GPU".to_owned())
    }

    /// (free, total) bytes of device memory.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn memory(&self) -> Result<(usize, usize), CudaError> {
        let ask = || {
            // Memory of dropped buffers rests in the driver's pool until it is told to let go.
            self.stream.synchronize()?;
            let mut pool = std::ptr::null_mut();
            // SAFETY: the device is open and the pool is its own; trimming frees only what nobody holds.
            unsafe {
                sys::cuDeviceGetDefaultMemPool(&mut pool, self.context.cu_device()).result()?;
                sys::cuMemPoolTrimTo(pool, 0).result()?;
            }
            self.context.mem_get_info()
        };
        ask().map_err(CudaError::driver("asking for free memory"))
    }

    /// The stream that all work goes down.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Host memory for copies.
    pub(super) fn pinned(&self) -> PinnedMemory {
        PinnedMemory::new(&self.context)
    }

    /// Streaming multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// Whether it is of Hopper, whose warpgroup instructions (wgmma) no other architecture has, and its driver knows tensor copies.
    pub(super) fn has_warpgroups(&self) -> bool {
        self.has_warpgroups
    }

    /// The cuBLAS handle, bound to the stream.
    pub(super) fn cublas(&self) -> cublas::cublasHandle_t {
        self.cublas
    }

    /// A name for a model that will use the device.
    pub(super) fn register(&self) -> UserId {
        self.turn.register()
    }

    /// Waits until it is the turn of `user`.
    pub(super) fn turn(self: &Arc<Self>, user: UserId) -> Turn {
        self.turn.enter(user);
        Turn(Arc::clone(self))
    }

    /// Keeps the first failure for [`Device::take_failure`].
    pub(super) fn note<T>(&self, result: Result<T, CudaError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
                None
            }
        }
    }

    /// Whether a failure waits to be taken.
    pub(super) fn has_failed(&self) -> bool {
        let failure = self.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Its number.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// The first failure since the last call.
    pub(super) fn take_failure(&self) -> Result<(), CudaError> {
        match self
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// A compiled kernel.
    pub(super) fn kernel(
        &self,
        kernel: Kernel,
        options: &[(&'static str, u32)],
    ) -> Result<CudaFunction, CudaError> {
        self.kernels.get(kernel, options)
    }

    /// Compiles kernels ahead of their first launch.
    pub(super) fn prepare(&self, variants: &[Variant]) -> Result<(), CudaError> {
        self.kernels.prepare(variants)
    }

    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets passes be replayed as graphs, or not; it is allowed at first. For models that ask for none, and for measuring.
    pub fn use_graphs(&self, allowed: bool) {
        self.recorder().enable(allowed);
    }

    /// What has become of passes since the device was opened.
    pub fn graph_counts(&self) -> GraphCounts {
        self.recorder().counts()
    }

    /// Holds back what this thread launches, to be launched as a graph; for the rest of its turn.
    pub(super) fn record(&self) {
        self.recorder().begin();
    }

    /// Sends what was held back on its way: whoever waits for the device or reads from it does this first.
    pub(super) fn flush(&self) {
        let result = self.recorder().flush();
        self.note_launches(result);
    }

    /// Sends what was held back on its way and holds nothing back for the rest of the turn: whoever puts anything but a launch on the
    /// stream, or gives memory back, does this first.
    pub(super) fn interrupt(&self) {
        let result = self.recorder().interrupt();
        self.note_launches(result);
    }

    fn note_launches(&self, result: Result<(), DriverError>) {
        self.note(result.map_err(CudaError::driver("launching a kernel")));
    }

    /// Launches a kernel with the arguments that `push` adds, now or with the pass it is part of. It may start before the one ahead of
    /// it has ended; what it touches of that one's comes after its `wait_for_previous`.
    ///
    /// # Safety
    /// The kernel is this device's. The arguments must be those of the kernel, and every address in them must be memory of a
    /// [`DeviceMemory`](super::DeviceMemory), which is not given back before the launch, of the size that the kernel touches.
    pub(super) unsafe fn launch(
        &self,
        function: &CudaFunction,
        shape: LaunchShape,
        push: impl FnOnce(&mut Arguments<'_>),
    ) -> Result<(), CudaError> {
        // SAFETY: functions live as long as the kernel cache, and memory interrupts the recorder before it is given back; the
        // rest is the caller's promise.
        let launched = unsafe { self.recorder().launch(function.cu_function(), shape, push) };
        launched.map_err(CudaError::driver("launching a kernel"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Graphs are given back with the device's context at hand.
        let _ = self.context.bind_to_thread();
        // SAFETY: the handle is live and not used again. A failure at the end of the process helps nobody.
        let _ = unsafe { cudarc::cublas::result::destroy_handle(self.cublas) };
    }
}
