//! What GPUs are, and how they reach each other, as the driver tells.

use std::ffi::c_int;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, sys};

use super::error::CudaError;
use crate::device::{DeviceInfo, DeviceLink};

/// The GPUs of these numbers, each with its slowest link to another of them.
pub(crate) fn describe(numbers: &[usize]) -> Result<Vec<DeviceInfo>, CudaError> {
    let ask = || -> Result<Vec<DeviceInfo>, DriverError> {
        let open = |&number| CudaContext::new(number);
        let gpus: Vec<Arc<CudaContext>> = numbers.iter().map(open).collect::<Result<_, _>>()?;
        let mut infos = Vec::new();
        for (gpu, number) in gpus.iter().zip(numbers) {
            let mut slowest = None;
            for other in gpus.iter().filter(|other| other.ordinal() != *number) {
                slowest = slowest.max(Some(link(gpu, other)?));
            }
            infos.push(DeviceInfo {
                id: format!("cuda:{number}"),
                name: gpu.name()?,
                memory_bytes: gpu.total_mem()? as u64,
                link: slowest,
            });
        }
        Ok(infos)
    };
    ask().map_err(CudaError::driver("asking what the GPUs are"))
}

/// How two GPUs exchange data. Atomic operations on each other's memory are what NVLink has and PCIe has not.
fn link(from: &CudaContext, to: &CudaContext) -> Result<DeviceLink, DriverError> {
    use sys::CUdevice_P2PAttribute as Attribute;
    let has = |attribute| -> Result<bool, DriverError> {
        let mut value: c_int = 0;
        // SAFETY: both devices are open, and the value is a place for the answer.
        unsafe {
            sys::cuDeviceGetP2PAttribute(
                &raw mut value,
                attribute,
                from.cu_device(),
                to.cu_device(),
            )
        }
        .result()?;
        Ok(value != 0)
    };
    if has(Attribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED)? {
        Ok(DeviceLink::NvLink)
    } else if has(Attribute::CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED)? {
        Ok(DeviceLink::Pcie)
    } else {
        Ok(DeviceLink::Host)
    }
}
