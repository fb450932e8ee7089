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
use super::memory::{Buffer, Weight};
use super::nccl::NcclEnd;
use super::peer_memory::{Abandoned, open_memory};
use super::peer_norm::NormEnd;
use super::peer_sum::PeerEnd;
use crate::backend::{DType, Epilogue, Linear};
use crate::communicator::{Addend, Communicator, Norm, add_in_turn};
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
) -> Result<Vec<(CudaBackend, Group<CudaBackend>)>, EngineError> {
    let groups: Vec<Group<CudaBackend>> = if devices.len() == 1 {
        vec![None]
    } else {
        let boxed = |end| Some(Box::new(end) as Box<dyn Communicator<CudaBackend>>);
        RankGroup::join(&devices, half)?
            .into_iter()
            .map(boxed)
            .collect()
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
    /// The same, and where there are more than two GPUs.
    norms: Option<NormEnd>,
    abandoned: Arc<Abandoned>,
}

impl RankGroup {
    /// Joins devices on which products take rows of the 16-bit type `half`.
    ///
    /// # Errors
    /// [`CudaError::LibraryMissing`], [`CudaError::MulticastUndecided`], [`CudaError::Nccl`] or those of memory.
    pub fn join(devices: &[Arc<Device>], half: DType) -> Result<Vec<Self>, CudaError> {
        let abandoned = Arc::new(Abandoned::new(devices[0].pinned())?);
        let (mut peers, mut norms) = (None, None);
        if open_memory(devices)? {
            peers = PeerEnd::join(devices, &abandoned)?;
            if let [first, second] = devices {
                let is_f16 = half == DType::F16;
                norms = Some(NormEnd::join([first, second], is_f16, &abandoned)?);
            }
        }
        let (mut peers, mut norms) = (peers.into_iter().flatten(), norms.into_iter().flatten());
        let ends = devices.iter().zip(NcclEnd::join(devices)?);
        let end = |(device, nccl): (&Arc<Device>, _)| Self {
            device: Arc::clone(device),
            ranks: devices.len(),
            nccl,
            peers: peers.next(),
            norms: norms.next(),
            abandoned: Arc::clone(&abandoned),
        };
        Ok(ends.map(end).collect())
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

    /// Whether a product of so many elements can be sent as it is computed: over two GPUs that reach each other's memory.
    pub fn can_send(&self, elements: usize) -> bool {
        let norms = self.norms.as_ref();
        norms.is_some_and(|norms| norms.takes(elements))
    }

    /// Product, sum by [`SumWay::Peers`] and norm, in two kernels and with the same bits, of what [can be sent](Self::can_send): the
    /// product of `x`, added to the stream by the rank whose epilogue says so; the norm's weight and ε. A failure is the device's.
    pub fn send_and_norm(
        &self,
        backend: &CudaBackend,
        (x, projection, epilogue): (&Buffer, &Linear<Weight>, Epilogue),
        stream: &mut Buffer,
        (weight, eps): (&Weight, f32),
        out: &mut Buffer,
    ) {
        let mut send_and_norm = || {
            let norms = self.norms.as_ref().expect("what was asked before");
            let sent = (epilogue, norms.sending());
            backend.product(x, &[projection], sent, false, stream)?;
            let (rows, width) = (stream.len() / weight.shape().1, weight.shape().1);
            let elements = backend.elements_for_product(rows, width);
            out.resize(elements, stream.len())?;
            norms.norm(
                (stream.address(), rows),
                (weight.address(), width),
                eps,
                (out.address(), elements.rows_by_lane()),
            )
        };
        self.device.note(send_and_norm());
    }
}

impl Communicator<CudaBackend> for RankGroup {
    fn sum(&self, x: &mut Buffer, bulk: bool) {
        // After a failure here the buffer may not be what the others add to.
        if self.device.has_failed() {
            return self.leave();
        }
        self.sum_by(self.way(x.len(), bulk), x);
    }

    fn add(
        &self,
        backend: &CudaBackend,
        addend: &Addend<'_, CudaBackend>,
        stream: &mut Buffer,
        norm: Option<Norm<'_, CudaBackend>>,
    ) {
        if self.device.has_failed() {
            return self.leave();
        }
        let (outputs, inputs) = addend.projection.weight.shape();
        let elements = addend.x.len() / inputs * outputs;
        match norm {
            Some(norm) if !addend.bulk && self.can_send(elements) => {
                let product = (addend.x, addend.projection, addend.epilogue);
                let weight = (norm.weight, norm.eps);
                self.send_and_norm(backend, product, stream, weight, norm.out);
            }
            norm => add_in_turn(self, backend, addend, stream, norm),
        }
    }

    fn leave(&self) {
        self.abandoned.set();
        self.nccl.leave();
    }
}
