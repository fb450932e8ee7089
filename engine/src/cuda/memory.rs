//! Device memory: buffers that grow and are never given back between forwards, and weights.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, DriverError, sys};

use super::device::Device;
use super::error::CudaError;
use super::pinned::PinnedMemory;

/// For `map_err`: `bytes` bytes of a device could not be taken.
pub(super) fn not_taken(device: &Device, bytes: usize) -> impl FnOnce(DriverError) -> CudaError {
    move |source| {
        if source.0 != sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return CudaError::driver("taking memory")(source);
        }
        let (free, total) = device.memory().unwrap_or_default();
        CudaError::OutOfMemory {
            wanted: bytes,
            free,
            total,
        }
    }
}

/// Bytes on a device.
pub struct DeviceMemory {
    device: Arc<Device>,
    slice: Option<CudaSlice<u8>>,
}

impl DeviceMemory {
    /// No bytes yet.
    pub fn new(device: &Arc<Device>) -> Self {
        Self {
            device: Arc::clone(device),
            slice: None,
        }
    }

    /// `bytes` zeros.
    pub(super) fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self, CudaError> {
        let mut memory = Self::new(device);
        memory.reserve(bytes)?;
        memory.zero()?;
        Ok(memory)
    }

    /// A copy of `values`.
    pub(super) fn from_slice<T: DeviceRepr>(
        device: &Arc<Device>,
        values: &[T],
    ) -> Result<Self, CudaError> {
        let mut memory = Self::new(device);
        memory.reserve(size_of_val(values))?;
        memory.write(0, values)?;
        Ok(memory)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.slice.as_ref().map_or(0, CudaSlice::num_bytes)
    }

    /// Makes room for `bytes` and more, so that lengths that grow from pass to pass seldom take memory, which waits for the device;
    /// what was held is lost then. True when it was.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<bool, CudaError> {
        if bytes <= self.bytes() {
            return Ok(false);
        }
        self.reserve(bytes.next_power_of_two())
    }

    /// Makes room for `bytes`; what was held is lost when it must grow. True when it did.
    pub(super) fn reserve(&mut self, bytes: usize) -> Result<bool, CudaError> {
        if bytes <= self.bytes() {
            return Ok(false);
        }
        self.release();
        // SAFETY: uninitialised bytes; every user writes before it reads.
        let slice = unsafe { self.device.stream().alloc::<u8>(bytes) };
        self.slice = Some(slice.map_err(not_taken(&self.device, bytes))?);
        Ok(true)
    }

    /// Gives the bytes back, behind the launches that were promised them.
    fn release(&mut self) {
        if self.slice.is_some() {
            self.device.interrupt();
            self.slice = None;
        }
    }

    /// Where the bytes begin; 0 without any.
    pub fn address(&self) -> u64 {
        self.slice
            .as_ref()
            .map_or(0, |slice| slice.device_ptr(self.device.stream()).0)
    }

    /// Sets all bytes to 0.
    pub(super) fn zero(&mut self) -> Result<(), CudaError> {
        match &mut self.slice {
            None => Ok(()),
            Some(slice) => {
                self.device.interrupt();
                let stream = self.device.stream();
                stream
                    .memset_zeros(slice)
                    .map_err(CudaError::driver("clearing memory"))
            }
        }
    }

    /// Copies `values` to `offset`, which is in bytes.
    pub(super) fn write<T: DeviceRepr>(
        &mut self,
        offset: usize,
        values: &[T],
    ) -> Result<(), CudaError> {
        if values.is_empty() {
            return Ok(());
        }
        assert!(
            offset + size_of_val(values) <= self.bytes(),
            "a write inside the buffer"
        );
        let stream = self.device.stream();
        self.device.interrupt();
        self.device_bound()?;
        // SAFETY: the range is inside the buffer, and the host slice outlives the copy: pageable memory is staged before the
        // call returns, and pinned memory is left alone until the device was waited for.
        unsafe {
            cudarc::driver::result::memcpy_htod_async(
                self.address() + offset as u64,
                values,
                stream.cu_stream(),
            )
        }
        .map_err(CudaError::driver("copying to the GPU"))
    }

    /// Copies `bytes` bytes from offset `from` to offset `to`, apart from each other; nobody waits for it.
    pub(super) fn copy_within(
        &mut self,
        from: usize,
        to: usize,
        bytes: usize,
    ) -> Result<(), CudaError> {
        assert!(
            from.max(to) + bytes <= self.bytes() && from.abs_diff(to) >= bytes,
            "two ranges of the buffer"
        );
        let stream = self.device.stream();
        self.device.interrupt();
        self.device_bound()?;
        // SAFETY: both ranges are inside the buffer and apart, as was just checked.
        unsafe {
            cudarc::driver::result::memcpy_dtod_async(
                self.address() + to as u64,
                self.address() + from as u64,
                bytes,
                stream.cu_stream(),
            )
        }
        .map_err(CudaError::driver("copying on the GPU"))
    }

    /// Copies `out.len()` elements from `offset`, which is in bytes, and waits for them.
    pub fn read<T: DeviceRepr>(&self, offset: usize, out: &mut [T]) -> Result<(), CudaError> {
        self.device.flush();
        if !out.is_empty() {
            assert!(
                offset + size_of_val(out) <= self.bytes(),
                "a read inside the buffer"
            );
            self.device_bound()?;
            let stream = self.device.stream();
            // SAFETY: the range is inside the buffer, and `out` lives until the wait below.
            unsafe {
                cudarc::driver::result::memcpy_dtoh_async(
                    out,
                    self.address() + offset as u64,
                    stream.cu_stream(),
                )
            }
            .map_err(CudaError::driver("copying from the GPU"))?;
        }
        self.device
            .stream()
            .synchronize()
            .map_err(CudaError::driver("waiting for the GPU"))
    }

    /// Copies `values` to `offset`, which is in bytes, through `host`; nobody may touch that before the device has been waited for.
    pub(super) fn write_pinned<T: DeviceRepr + Copy>(
        &mut self,
        offset: usize,
        values: &[T],
        host: &mut PinnedMemory,
    ) -> Result<(), CudaError> {
        let staged = host.elements(values.len())?;
        staged.copy_from_slice(values);
        self.write(offset, staged)
    }

    /// Copies `len` elements from `offset`, which is in bytes, to `host`, and waits for them.
    pub(super) fn read_pinned<'a, T: DeviceRepr + Copy>(
        &self,
        offset: usize,
        len: usize,
        host: &'a mut PinnedMemory,
    ) -> Result<&'a [T], CudaError> {
        let staged = host.elements(len)?;
        self.read(offset, staged)?;
        Ok(staged)
    }

    fn device_bound(&self) -> Result<(), CudaError> {
        self.device
            .stream()
            .context()
            .bind_to_thread()
            .map_err(CudaError::driver("binding the GPU"))
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        self.release();
    }
}

/// What an activation buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elements {
    /// f32.
    Single,
    /// The backend's 16-bit type.
    Half,
    /// The same, so many rows as the products' kernel for few rows reads them: `four_by_lane` in prelude.cuh.
    HalfByLane { rows: usize },
}

impl Elements {
    /// How many rows lie by lane; 0 where they lie side by side.
    pub(super) fn rows_by_lane(self) -> usize {
        match self {
            Self::HalfByLane { rows } => rows,
            Self::Single | Self::Half => 0,
        }
    }
}

/// Activations: what the last operation wrote.
pub struct Buffer {
    memory: DeviceMemory,
    elements: Elements,
    len: usize,
}

impl Buffer {
    /// An empty buffer.
    pub(super) fn new(device: &Arc<Device>) -> Self {
        Self {
            memory: DeviceMemory::new(device),
            elements: Elements::Single,
            len: 0,
        }
    }

    /// Makes room for `len` elements of the kind.
    pub(super) fn resize(&mut self, elements: Elements, len: usize) -> Result<(), CudaError> {
        let bytes = len * if elements == Elements::Single { 4 } else { 2 };
        self.memory.grow(bytes)?;
        (self.elements, self.len) = (elements, len);
        Ok(())
    }

    /// Elements held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// What they are.
    pub(super) fn elements(&self) -> Elements {
        self.elements
    }

    /// Where they are.
    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }

    /// The bytes behind it.
    pub fn memory(&self) -> &DeviceMemory {
        &self.memory
    }

    /// The bytes behind it, to write.
    pub(super) fn memory_mut(&mut self) -> &mut DeviceMemory {
        &mut self.memory
    }
}

/// A weight on the device: a matrix in the backend's 16-bit type, or a vector widened to f32.
pub struct Weight {
    memory: DeviceMemory,
    rows: usize,
    cols: usize,
}

impl Weight {
    pub(super) fn new(memory: DeviceMemory, rows: usize, cols: usize) -> Self {
        Self { memory, rows, cols }
    }

    /// `[rows, cols]`; a vector has one row.
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    pub(super) fn address(&self) -> u64 {
        self.memory.address()
    }
}
