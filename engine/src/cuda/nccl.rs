//! [`NcclEnd`]: sums over GPUs through NCCL, on the ranks' own streams.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::nccl::{result, sys};

use super::device::Device;
use super::elementwise::RowKernels;
use super::error::CudaError;
use super::memory::DeviceMemory;

/// NCCL's switch for NVLink multicast.
const MULTICAST: &str = "NCCL_NVLS_ENABLE";

/// Keeps NVLink multicast off unless the environment says otherwise: a process that fails while it uses it can leave a host's GPUs
/// unusable for all. Call it before the process has a second thread; later it does nothing, and splitting a model over GPUs is
/// refused until the environment decides.
pub fn keep_multicast_off() {
    let threads = std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count);
    if threads == 1 && std::env::var_os(MULTICAST).is_none() {
        // SAFETY: no other thread of this process can read the environment: there is none.
        unsafe { std::env::set_var(MULTICAST, "0") };
    }
}

/// NCCL's handle of one rank, until somebody of the group has left.
type Handle = Mutex<Option<Communication>>;

struct Communication(sys::ncclComm_t);

// SAFETY: NCCL's communicators may be used by any thread, one at a time; the mutex around each sees to that.
unsafe impl Send for Communication {}

/// One rank's end.
pub(super) struct NcclEnd {
    device: Arc<Device>,
    rank: usize,
    /// Of all ranks: who leaves must end what the others wait for.
    handles: Arc<Vec<Handle>>,
    /// `[ranks, elements]`, where parts are gathered.
    parts: Mutex<DeviceMemory>,
}

impl NcclEnd {
    /// Joins devices, and lets them add up once: NCCL connects them when it is first used.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`], [`CudaError::MulticastUndecided`] or [`CudaError::Nccl`].
    pub(super) fn join(devices: &[Arc<Device>]) -> Result<Vec<Self>, CudaError> {
        // SAFETY: only tries to load the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::LibraryMissing {
                library: "libnccl.so",
                needed_for: "it adds up what the GPUs of a split model have; put NCCL's folder on LD_LIBRARY_PATH, with a link of this name to libnccl.so.2",
            });
        }
        if std::env::var_os(MULTICAST).is_none() {
            return Err(CudaError::MulticastUndecided);
        }
        let numbers: Vec<i32> = devices.iter().map(|d| d.ordinal() as i32).collect();
        let mut handles = vec![std::ptr::null_mut(); devices.len()];
        // SAFETY: both arrays have an element per device.
        let joined = unsafe {
            result::comm_init_all(handles.as_mut_ptr(), numbers.len() as i32, numbers.as_ptr())
        };
        joined.map_err(failed("joining the GPUs"))?;
        let handles = handles
            .into_iter()
            .map(|h| Mutex::new(Some(Communication(h))));
        let handles = Arc::new(handles.collect::<Vec<Handle>>());
        let end = |(rank, device): (usize, &Arc<Device>)| Self {
            device: Arc::clone(device),
            rank,
            handles: Arc::clone(&handles),
            parts: Mutex::new(DeviceMemory::new(device)),
        };
        let ends: Vec<Self> = devices.iter().enumerate().map(end).collect();
        Self::try_out(&ends)?;
        Ok(ends)
    }

    /// A sum of one number per rank, which this thread asks for on behalf of all.
    fn try_out(ends: &[Self]) -> Result<(), CudaError> {
        const WHAT: &str = "adding up for the first time";
        let mut numbers = Vec::new();
        for end in ends {
            let own = [end.rank as f32 + 1.0];
            numbers.push(DeviceMemory::from_slice(&end.device, &own)?);
        }
        result::group_start().map_err(failed(WHAT))?;
        let mut asked = Ok(());
        for (end, number) in ends.iter().zip(&numbers) {
            asked = asked.and(end.all_reduce(number.address(), 1));
        }
        result::group_end().map_err(failed(WHAT))?;
        asked?;
        let want = (ends.len() * (ends.len() + 1) / 2) as f32;
        for number in &numbers {
            let mut sum = [0.0f32];
            number.read(0, &mut sum)?;
            if sum[0] != want {
                let why = format!("the sum is {}, not {want}", sum[0]);
                return Err(CudaError::Nccl { what: WHAT, why });
            }
        }
        Ok(())
    }

    /// Calls `operation` with this rank's handle.
    fn with_handle(
        &self,
        what: &'static str,
        operation: impl FnOnce(
            sys::ncclComm_t,
            sys::cudaStream_t,
        ) -> Result<result::NcclStatus, result::NcclError>,
    ) -> Result<(), CudaError> {
        let handle = self.handles[self.rank].lock();
        let handle = handle.unwrap_or_else(PoisonError::into_inner);
        let Some(Communication(handle)) = &*handle else {
            return Err(CudaError::RankLeft);
        };
        self.device.interrupt();
        let stream = self.device.stream();
        stream
            .context()
            .bind_to_thread()
            .map_err(CudaError::driver("binding the GPU"))?;
        operation(*handle, stream.cu_stream().cast())
            .map(|_| ())
            .map_err(failed(what))
    }

    /// Replaces `elements` floats at `x` by their sum over the ranks, in NCCL's order.
    pub(super) fn all_reduce(&self, x: u64, elements: usize) -> Result<(), CudaError> {
        self.with_handle("adding up", |handle, stream| {
            // SAFETY: `elements` floats lie at x on this rank's device, and the operation is in its stream's order.
            unsafe {
                result::all_reduce(
                    x as *const _,
                    x as *mut _,
                    elements,
                    sys::ncclDataType_t::ncclFloat32,
                    sys::ncclRedOp_t::ncclSum,
                    handle,
                    stream,
                )
            }
        })
    }

    /// The same sum with one order: rank by rank.
    pub(super) fn gather_and_add(&self, x: u64, elements: usize) -> Result<(), CudaError> {
        let ranks = self.handles.len();
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.grow(ranks * elements * 4)?;
        let gathered = parts.address();
        self.with_handle("gathering parts", |handle, stream| {
            // SAFETY: `elements` floats lie at x, and there is room for those of all ranks.
            unsafe {
                result::all_gather(
                    x as *const _,
                    gathered as *mut _,
                    elements,
                    sys::ncclDataType_t::ncclFloat32,
                    handle,
                    stream,
                )
            }
        })?;
        let kernels = RowKernels {
            device: &self.device,
            half_is_f16: false,
        };
        kernels.sum_ranks(gathered, ranks, (x, elements))
    }

    /// Ends what the others wait for, with a failure, and the group.
    pub(super) fn leave(&self) {
        for handle in self.handles.iter() {
            let handle = handle.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Communication(handle)) = handle {
                // SAFETY: the handle was live and nobody can take it any more. What it still waits for ends with a failure.
                let _ = unsafe { result::comm_abort(handle) };
            }
        }
    }
}

impl Drop for NcclEnd {
    fn drop(&mut self) {
        let handle = self.handles[self.rank].lock();
        let handle = handle.unwrap_or_else(PoisonError::into_inner).take();
        if let Some(Communication(handle)) = handle {
            // SAFETY: the handle is live, and its rank's last operation has ended: every pass waits for its end.
            let _ = unsafe { result::comm_abort(handle) };
        }
    }
}

/// For `map_err`: an NCCL call that failed while doing `what`.
fn failed(what: &'static str) -> impl FnOnce(result::NcclError) -> CudaError {
    move |error| CudaError::Nccl {
        what,
        why: format!("{:?}", error.0),
    }
}
