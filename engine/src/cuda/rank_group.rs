//! [`RankGroup`]: the ranks of a split model, one GPU of this host each, and how they add up.
//!
//! What is added up is the residual stream, in f32: rounding the parts to 16 bits would add an error per layer that one GPU does not
//! make, and at the few rows of decoding a sum takes the time of its launch and of a way over the link, not of its bytes.
//!
//! An element's sum must not depend on what else is summed, and NCCL's order of three and more follows from an element's place in the
//! buffer. So few rows are added up rank by rank, by a kernel where the GPUs reach each other's memory, else gathered by NCCL
//! and added. Prompt chunks run alone, and are summed by NCCL.

use std::sync::Arc;

use super::backend::CudaBackend;
use super::device::Device;
use super::error::CudaError;
use super::memory::Buffer;
use super::nccl::NcclEnd;
use super::peer_sum::PeerEnd;
use crate::backend::DType;
use crate::communicator::Communicator;
use crate::error::EngineError;
use crate::loading::{Group, LoadOptions};

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
        RankGroup::join(&devices)?.into_iter().map(boxed).collect()
    };
    let backends = devices.into_iter().map(|d| CudaBackend::new(d, half));
    backends.zip(groups).map(|(b, g)| Ok((b?, g))).collect()
}

/// Ways to add up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SumWay {
    /// By a kernel, through the peers' memory; rank by rank.
    Peers,
    /// Gathered by NCCL, and added rank by rank.
    Gathered,
    /// By NCCL, in its own order.
    Nccl,
}

/// One rank's end.
pub struct RankGroup {
    device: Arc<Device>,
    ranks: usize,
    nccl: NcclEnd,
    /// `None` where the GPUs do not reach each other's memory.
    peers: Option<PeerEnd>,
}

impl RankGroup {
    /// Joins devices.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`], [`CudaError::MulticastUndecided`], [`CudaError::Nccl`] or those of memory.
    pub fn join(devices: &[Arc<Device>]) -> Result<Vec<Self>, CudaError> {
        let peers: Vec<Option<PeerEnd>> = match PeerEnd::join(devices)? {
            Some(ends) => ends.into_iter().map(Some).collect(),
            None => devices.iter().map(|_| None).collect(),
        };
        let ends = NcclEnd::join(devices)?.into_iter().zip(peers);
        let end = |(device, (nccl, peers)): (&Arc<Device>, _)| Self {
            device: Arc::clone(device),
            ranks: devices.len(),
            nccl,
            peers,
        };
        Ok(devices.iter().zip(ends).map(end).collect())
    }

    /// Whether so many elements can be added up that way.
    pub fn can(&self, way: SumWay, elements: usize) -> bool {
        let peers = self.peers.as_ref();
        way != SumWay::Peers || peers.is_some_and(|peers| peers.takes(elements))
    }

    /// How so many elements are added up.
    fn way(&self, elements: usize, bulk: bool) -> SumWay {
        if bulk {
            SumWay::Nccl
        } else if self.can(SumWay::Peers, elements) {
            SumWay::Peers
        } else if self.ranks == 2 {
            // The sum of two numbers has one order.
            SumWay::Nccl
        } else {
            SumWay::Gathered
        }
    }

    /// A sum in a way that it [can](Self::can) be made; a failure is the device's.
    pub fn sum_by(&self, way: SumWay, x: &mut Buffer) {
        let (address, elements) = (x.address(), x.len());
        let result = match (way, &self.peers) {
            (SumWay::Nccl, _) => self.nccl.all_reduce(address, elements),
            (SumWay::Peers, Some(peers)) => peers.sum(address, elements),
            _ => self.nccl.gather_and_add(address, elements),
        };
        self.device.note(result);
    }
}

impl Communicator<Buffer> for RankGroup {
    fn sum(&self, x: &mut Buffer, bulk: bool) {
        // After a failure here the buffer may not be what the others add to.
        if self.device.has_failed() {
            return self.leave();
        }
        self.sum_by(self.way(x.len(), bulk), x);
    }

    fn leave(&self) {
        if let Some(peers) = &self.peers {
            peers.leave();
        }
        self.nccl.leave();
    }
}
