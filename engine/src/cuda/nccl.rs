//! [`NcclGroup`]: the ranks of a split model, one GPU of this host each, adding up through NCCL on their own streams.
//!
//! What is added up is the residual stream, in f32: rounding the parts to 16 bits would add an error per layer that one GPU does not
//! make, and at the few rows of decoding a sum takes the time of its launch and of a round trip, not of its bytes.
//!
//! An element's sum must not depend on what else is summed. Of two numbers there is one sum; NCCL's order of three and more follows
//! from an element's place in the buffer, so larger groups gather the parts and add them rank by rank. Prompt chunks run
//! alone, and are summed by NCCL.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::nccl::{result, sys};

use super::backend::CudaBackend;
use super::device::Device;
use super::elementwise::RowKernels;
use super::error::CudaError;
use super::memory::{Buffer, DeviceMemory};
use crate::backend::DType;
use crate::communicator::Communicator;
use crate::error::EngineError;
use crate::loading::{Group, LoadOptions};

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

/// The GPUs of these numbers, as a model's options want them.
///
/// # Errors
/// Those of [`Device::open`].
pub(crate) fn open(
    numbers: &[usize],
    options: &LoadOptions,
) -> Result<Vec<Arc<Device>>, CudaError> {
    let open = |&number| {
        let device = Device::shared(number, options.kernel_cache.clone())?;
        if !options.cuda_graphs {
            device.use_graphs(false);
        }
        Ok(device)
    };
    numbers.iter().map(open).collect()
}

/// Backends on these GPUs, and what joins them where they are several.
///
/// # Errors
/// [`CudaError::LibraryMissing`] or [`CudaError::Nccl`] where ranks cannot be joined.
pub(crate) fn ranks(
    devices: Vec<Arc<Device>>,
    half: DType,
) -> Result<Vec<(CudaBackend, Group<Buffer>)>, EngineError> {
    let groups: Vec<Group<Buffer>> = if devices.len() == 1 {
        vec![None]
    } else {
        let boxed = |end| Some(Box::new(end) as Box<dyn Communicator<Buffer>>);
        NcclGroup::join(&devices)?.into_iter().map(boxed).collect()
    };
    let backends = devices.into_iter().map(|d| CudaBackend::new(d, half));
    backends.zip(groups).map(|(b, g)| Ok((b?, g))).collect()
}

/// NCCL's handle of one rank, until somebody of the group has left.
type Handle = Mutex<Option<Communication>>;

struct Communication(sys::ncclComm_t);

// SAFETY: NCCL's communicators may be used by any thread, one at a time; the mutex around each sees to that.
unsafe impl Send for Communication {}

/// One rank's end.
pub struct NcclGroup {
    device: Arc<Device>,
    rank: usize,
    /// Of all ranks: who leaves must end what the others wait for.
    handles: Arc<Vec<Handle>>,
    /// `[ranks, elements]`, where parts are gathered.
    parts: Mutex<DeviceMemory>,
}

impl NcclGroup {
    /// Joins devices, and lets them add up once: NCCL connects them when it is first used.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`], [`CudaError::MulticastUndecided`] or [`CudaError::Nccl`].
    pub fn join(devices: &[Arc<Device>]) -> Result<Vec<Self>, CudaError> {
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

    /// A sum by NCCL's own order, or `gathered` and added rank by rank; for benchmarks.
    pub fn sum_one_way(&self, x: &mut Buffer, gathered: bool) {
        let (address, elements) = (x.address(), x.len());
        let result = if gathered {
            self.gather_and_add(address, elements)
        } else {
            self.all_reduce(address, elements)
        };
        self.device.note(result);
    }

    fn all_reduce(&self, x: u64, elements: usize) -> Result<(), CudaError> {
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
    fn gather_and_add(&self, x: u64, elements: usize) -> Result<(), CudaError> {
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
}

impl Communicator<Buffer> for NcclGroup {
    fn sum(&self, x: &mut Buffer, bulk: bool) {
        // After a failure here the buffer may not be what the others add to.
        if self.device.has_failed() {
            return self.leave();
        }
        self.sum_one_way(x, !bulk && self.handles.len() > 2);
    }

    fn leave(&self) {
        for handle in self.handles.iter() {
            let handle = handle.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Communication(handle)) = handle {
                // SAFETY: the handle was live and nobody can take it any more. What it still waits for ends with a failure.
                let _ = unsafe { result::comm_abort(handle) };
            }
        }
    }
}

impl Drop for NcclGroup {
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
