//! [`CudaBackend`]: the transformer's operations as launches on one device's stream.

mod workbench;

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::argmax::Argmax;
use super::attention::{self, AttentionCall, DecodeScratch};
use super::attention_prefill::{self, PrefillKernel};
use super::batch::{self, DeviceBatch};
use super::chunks::Chunks;
use super::device::{Device, Turn};
use super::elementwise::{self, RotateArgs as KernelRotateArgs, RowKernels};
use super::error::CudaError;
use super::hand_out::{HandOuts, Layer};
use super::kv_store::KvStore;
use super::linear::{self, Product, ProductKernel, out_width};
use super::linear_wgmma;
use super::linear_wide;
use super::memory::{Buffer, DeviceMemory, Elements, Weight};
use super::peer_norm::Sending;
use super::pinned::PinnedMemory;
use super::selection::{self, MAX_ROW};
use super::staging::Staging;
use super::turnstile::UserId;
use super::weights::WeightMaker;
use crate::backend::{
    AttentionArgs, AttentionShape, Backend, Bias, Cut, DType, Epilogue, HandOut, KvShape, Linear,
    Masses, Pass, Peak, RotateArgs,
};
use crate::checkpoint::Tensor;
use crate::crew::Crew;
use crate::error::EngineError;
use crate::row_selection::SelectedRows;

/// Logits that cross at a time, but for a session's own: 64 MiB.
const PIECE: usize = 1 << 24;

/// Head widths that the attention kernels are written for.
const HEAD_DIMS: [usize; 8] = [16, 32, 48, 64, 80, 96, 128, 256];

/// A GPU as a backend.
pub struct CudaBackend {
    device: Arc<Device>,
    half: DType,
    /// This model among those that share the device.
    user: UserId,
    /// Keys per unit of decode attention, where it is not the shape's own.
    chunks: Option<Chunks>,
    /// Which kernel products take, where it is not to be the fastest one.
    product_kernel: Cell<Option<ProductKernel>>,
    /// The same for attention of long spans.
    prefill_kernel: Cell<Option<PrefillKernel>>,
    /// The way of weights, until all are there.
    staging: RefCell<Staging>,
    state: RefCell<State>,
}

/// What changes from pass to pass.
struct State {
    batch: DeviceBatch,
    decode: DecodeScratch,
    /// Gate and up products of cuBLAS.
    gated: DeviceMemory,
    frequencies: DeviceMemory,
    hand_outs: HandOuts,
    argmax: Argmax,
    /// Where logits arrive.
    host: PinnedMemory,
}

impl CudaBackend {
    /// A backend on `device` whose weights and KV entries are of the 16-bit type `half`.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for a type of 32 bits.
    pub fn new(device: Arc<Device>, half: DType) -> Result<Self, EngineError> {
        if half == DType::F32 {
            let reason = "the GPU computes with bf16 or f16".to_owned();
            return Err(EngineError::InvalidArgument {
                what: "number type",
                reason,
            });
        }
        let memory = || DeviceMemory::new(&device);
        let state = State {
            batch: DeviceBatch::new(&device),
            decode: DecodeScratch::new(&device),
            gated: memory(),
            frequencies: memory(),
            hand_outs: HandOuts::new(&device),
            argmax: Argmax::new(&device),
            host: device.pinned(),
        };
        Ok(Self {
            staging: RefCell::new(Staging::new(&device)),
            state: RefCell::new(state),
            user: device.register(),
            chunks: None,
            product_kernel: Cell::new(None),
            prefill_kernel: Cell::new(None),
            device,
            half,
        })
    }

    fn chunks_for(&self, shape: &AttentionShape) -> Chunks {
        self.chunks.unwrap_or_else(|| Chunks::of(shape))
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    fn rows(&self) -> RowKernels<'_> {
        RowKernels {
            device: &self.device,
            half_is_f16: self.half == DType::F16,
        }
    }

    fn weights(&self) -> WeightMaker<'_> {
        WeightMaker {
            device: &self.device,
            half: self.half,
            rows: self.rows(),
            staging: &self.staging,
        }
    }

    /// The products of the rows of `x` with all of these projections, side by side in a row of `out`, or sent to where they are summed.
    pub(super) fn product(
        &self,
        x: &Buffer,
        projections: &[&Linear<Weight>],
        (epilogue, sending): (Epilogue, Sending),
        bulk: bool,
        out: &mut Buffer,
    ) -> Result<(), CudaError> {
        debug_assert_ne!(x.elements(), Elements::Single);
        let rows = x.len() / projections[0].weight.shape().1;
        let width = out_width(projections, epilogue);
        // A library knows no rows by lane.
        let bulk = bulk && x.elements() == Elements::Half;
        match epilogue {
            Epilogue::Store => out.resize(Elements::Single, rows * width)?,
            Epilogue::SwiGlu if bulk => out.resize(Elements::Half, rows * width)?,
            Epilogue::SwiGlu => out.resize(self.elements_for_product(rows, width), rows * width)?,
            Epilogue::Add => debug_assert_eq!(out.len(), rows * width),
        }
        let mut product = Product {
            x: x.address(),
            rows,
            projections,
            epilogue,
            out: out.address(),
            by_lane: [x.elements(), out.elements()]
                .map(|e| e.rows_by_lane() > 0)
                .into(),
            half_is_f16: self.half == DType::F16,
            sending,
        };
        if !bulk {
            return product.stream(&self.device, self.product_kernel.get());
        }
        if epilogue != Epilogue::SwiGlu {
            return product.library(&self.device);
        }
        let mut state = self.state.borrow_mut();
        state.gated.reserve(rows * 2 * width * 4)?;
        product.out = state.gated.address();
        product.library(&self.device)?;
        self.rows()
            .gated_silu(product.out, (rows, width), out.address())
    }

    /// What rows of 16-bit numbers are that a product is to take.
    pub(super) fn elements_for_product(&self, rows: usize, width: usize) -> Elements {
        match self.product_kernel.get() {
            None => linear::elements_for_product(rows, width),
            Some(_) => Elements::Half,
        }
    }

    fn attend(
        &self,
        q: &Buffer,
        pass: &Pass<'_>,
        args: &AttentionArgs<'_, Self>,
        wanted: &mut HandOut<'_>,
        out: &mut Buffer,
    ) -> Result<(), CudaError> {
        let shape = args.shape;
        out.resize(
            Elements::Half,
            pass.tokens.len() * shape.num_heads * shape.head_dim,
        )?;
        let mut state = self.state.borrow_mut();
        let State {
            batch,
            decode,
            hand_outs,
            ..
        } = &mut *state;
        let call = AttentionCall {
            shape,
            q: q.address(),
            kv: args.kv,
            layer: args.layer,
            out: out.address(),
            batch,
        };
        if pass.bulk {
            return attention_prefill::prefill(&self.device, &call, self.prefill_kernel.get());
        }
        let target = hand_outs.target(pass, (args.layer, args.kv.num_layers()), wanted)?;
        attention::decode(&self.device, &call, decode, target)?;
        let Some(target) = target else {
            return Ok(());
        };
        let layer = Layer {
            shape,
            index: args.layer,
            count: args.kv.num_layers(),
        };
        hand_outs.take(self.rows(), pass, (&target, layer), wanted)
    }

    fn rotate(
        &self,
        qkv: &Buffer,
        pass: &Pass<'_>,
        args: &RotateArgs<'_, Self>,
        q: &mut Buffer,
    ) -> Result<(), CudaError> {
        let (rows, shape) = (pass.tokens.len(), args.shape);
        q.resize(Elements::Half, rows * shape.num_heads * shape.head_dim)?;
        let state = self.state.borrow();
        let (q_norm, k_norm, eps) = args
            .qk_norm
            .map_or((0, 0, 0.0), |(q, k, eps)| (q.address(), k.address(), eps));
        let args = KernelRotateArgs {
            qkv: qkv.address(),
            angles: args.angles.address(),
            q_norm,
            k_norm,
            q: q.address(),
            kv: args.kv.layer(args.layer),
            spans: state.batch.spans(),
            row_spans: state.batch.row_spans(),
            block_tables: state.batch.block_tables(),
            num_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            eps,
        };
        self.rows().rotate_and_store(&args.with_shape(shape), rows)
    }
}

impl Backend for CudaBackend {
    type Buffer = Buffer;
    type Weight = Weight;
    type Kv = KvStore;
    type Turn = Turn;

    fn begin(&self, pass: &Pass<'_>, shape: &AttentionShape, crew: &mut Crew) -> Turn {
        let turn = self.device.turn(self.user);
        let chunks = self.chunks_for(shape);
        let mut state = self.state.borrow_mut();
        let State {
            batch, hand_outs, ..
        } = &mut *state;
        let result = batch
            .upload(&self.device, pass, chunks, crew)
            .and_then(|()| hand_outs.begin(pass, batch, shape.num_heads));
        self.device.note(result);
        // From here on there is little but launches. Bulk passes mix them with a library's, and are long enough.
        if !pass.bulk {
            self.device.record();
        }
        turn
    }

    fn weight(&self, tensor: Tensor) -> Result<Weight, EngineError> {
        self.weights().of_tensor(&tensor)
    }

    fn random_weight(&self, shape: &[usize], cut: &Cut, seed: u32) -> Result<Weight, EngineError> {
        self.weights().random(shape, cut, seed)
    }

    fn device_memory(&self) -> Result<Option<(usize, usize)>, EngineError> {
        Ok(Some(self.device.memory()?))
    }

    fn buffer(&self) -> Buffer {
        Buffer::new(&self.device)
    }

    fn kv(&self, shape: KvShape) -> Result<KvStore, EngineError> {
        if !HEAD_DIMS.contains(&shape.head_dim) {
            return Err(EngineError::Unsupported(format!(
                "head_dim {} on a GPU (supported: {HEAD_DIMS:?})",
                shape.head_dim
            )));
        }
        if shape.dtype != self.half {
            let reason = format!(
                "on a GPU entries have the type of the weights, {:?}, not {:?}",
                self.half, shape.dtype
            );
            return Err(EngineError::InvalidArgument {
                what: "KV type",
                reason,
            });
        }
        Ok(KvStore::new(&self.device, shape)?)
    }

    fn copy_blocks(&self, kv: &mut KvStore, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        let _turn = self.device.turn(self.user);
        Ok(kv.copy_blocks(copies)?)
    }

    fn prepare(&self, shape: &AttentionShape) -> Result<(), EngineError> {
        self.staging.borrow_mut().release();
        let is_f16 = self.half == DType::F16;
        let chunks = self.chunks_for(shape);
        let mut variants = attention::variants(shape, u32::from(is_f16), chunks);
        variants.push(attention_prefill::variant(
            &self.device,
            shape,
            u32::from(is_f16),
        ));
        variants.extend(linear::variants(is_f16));
        variants.extend(linear_wide::variants(is_f16, &self.device));
        variants.extend(linear_wgmma::variants(is_f16, &self.device));
        variants.extend(elementwise::variants(is_f16));
        variants.extend(selection::variants());
        variants.extend(batch::variants());
        Ok(self.device.prepare(&variants)?)
    }

    fn embed(&self, table: &Weight, pass: &Pass<'_>, out: &mut Buffer) {
        let (width, rows) = (table.shape().1, pass.tokens.len());
        let tokens = self.state.borrow().batch.tokens();
        let result = out.resize(Elements::Single, rows * width).and_then(|()| {
            self.rows()
                .embed((table.address(), width), (tokens, rows), out.address())
        });
        self.device.note(result);
    }

    fn rms_norm(&self, x: &Buffer, weight: &Weight, eps: f32, out: &mut Buffer) {
        let width = weight.shape().1;
        let elements = self.elements_for_product(x.len() / width, width);
        let result = out.resize(elements, x.len()).and_then(|()| {
            self.rows().rms_norm(
                (x.address(), x.len() / width),
                (weight.address(), width),
                eps,
                (out.address(), elements.rows_by_lane()),
            )
        });
        self.device.note(result);
    }

    fn gather_rows(&self, x: &Buffer, width: usize, pass: &Pass<'_>, out: &mut Buffer) {
        let (chosen, rows) = (
            self.state.borrow().batch.logit_rows(),
            pass.logit_rows.len(),
        );
        let result = out.resize(Elements::Single, rows * width).and_then(|()| {
            self.rows()
                .gather_rows(x.address(), width, (chosen, rows), out.address())
        });
        self.device.note(result);
    }

    fn linear(
        &self,
        x: &Buffer,
        projections: &[&Linear<Weight>],
        epilogue: Epilogue,
        bulk: bool,
        out: &mut Buffer,
    ) {
        let whole = (epilogue, Sending::default());
        let result = self.product(x, projections, whole, bulk, out);
        self.device.note(result);
    }

    fn angles(&self, pass: &Pass<'_>, inverse_frequencies: &[f32], out: &mut Buffer) {
        let half = inverse_frequencies.len();
        let rows = pass.tokens.len();
        let mut state = self.state.borrow_mut();
        let result = (|| {
            // A model's frequencies never change, and a backend serves one model.
            if state.frequencies.bytes() != size_of_val(inverse_frequencies) {
                state.frequencies = DeviceMemory::from_slice(&self.device, inverse_frequencies)?;
            }
            out.resize(Elements::Single, rows * 2 * half)?;
            self.rows().rotary_angles(
                &state.batch,
                rows,
                (state.frequencies.address(), half),
                out.address(),
            )
        })();
        self.device.note(result);
    }

    fn rotate_and_store(
        &self,
        qkv: &Buffer,
        pass: &Pass<'_>,
        args: &RotateArgs<'_, Self>,
        q: &mut Buffer,
    ) {
        let result = self.rotate(qkv, pass, args, q);
        self.device.note(result);
    }

    fn attention(
        &self,
        q: &Buffer,
        pass: &Pass<'_>,
        args: &AttentionArgs<'_, Self>,
        wanted: &mut HandOut<'_>,
        out: &mut Buffer,
    ) {
        let result = self.attend(q, pass, args, wanted, out);
        self.device.note(result);
    }

    fn selects(&self, kv_len: usize) -> bool {
        kv_len <= MAX_ROW
    }

    fn select(
        &self,
        pass: &Pass<'_>,
        out: &mut [&mut SelectedRows],
        crew: &mut Crew,
    ) -> Result<(), EngineError> {
        let mut state = self.state.borrow_mut();
        self.device.note(state.hand_outs.selected(pass, out, crew));
        Ok(self.device.take_failure()?)
    }

    fn masses(&self, pass: &Pass<'_>, out: &mut [Masses<'_>]) -> Result<(), EngineError> {
        let mut state = self.state.borrow_mut();
        self.device.note(state.hand_outs.masses(pass, out));
        Ok(self.device.take_failure()?)
    }

    fn argmax(
        &self,
        x: &mut Buffer,
        width: usize,
        biases: &[Bias],
        out: &mut Vec<Option<Peak>>,
    ) -> Result<(), EngineError> {
        let rows = (x.address(), x.len() / width);
        let mut state = self.state.borrow_mut();
        let found = state.argmax.search(self.rows(), rows, width, biases);
        out.clear();
        out.extend(self.device.note(found).into_iter().flatten());
        Ok(self.device.take_failure()?)
    }

    fn read_parts(
        &self,
        x: &Buffer,
        parts: &mut [(Range<usize>, &mut [f32])],
        crew: &mut Crew,
    ) -> Result<(), EngineError> {
        debug_assert_eq!(x.elements(), Elements::Single);
        let mut state = self.state.borrow_mut();
        let together = |one: &(Range<usize>, _), other: &(Range<usize>, _)| {
            one.0.start / PIECE == (other.0.end - 1) / PIECE
        };
        for piece in parts.chunk_by_mut(together) {
            let (first, end) = (piece[0].0.start, piece[piece.len() - 1].0.end);
            let values = x
                .memory()
                .read_pinned::<f32>(first * 4, end - first, &mut state.host);
            if let Some(values) = self.device.note(values) {
                crew.for_each(piece, |(own, out)| {
                    out.copy_from_slice(&values[own.start - first..own.end - first]);
                });
            }
        }
        drop(state);
        Ok(self.device.take_failure()?)
    }

    fn read(&self, x: &Buffer, out: &mut Vec<f32>) -> Result<(), EngineError> {
        out.clear();
        match x.elements() {
            Elements::Single => {
                out.resize(x.len(), 0.0);
                self.device.note(x.memory().read(0, out));
            }
            Elements::Half | Elements::HalfByLane { .. } => {
                let mut bits = vec![0u16; x.len()];
                self.device.note(x.memory().read(0, &mut bits));
                let bits = linear::side_by_side(bits, x.elements().rows_by_lane());
                out.extend(bits.iter().map(|&b| match self.half {
                    DType::F16 => f16::from_bits(b).to_f32(),
                    _ => bf16::from_bits(b).to_f32(),
                }));
            }
        }
        Ok(self.device.take_failure()?)
    }

    fn finish(&self) -> Result<(), EngineError> {
        // Reads nothing, but waits: a failure of the device shows here.
        self.device
            .note(DeviceMemory::new(&self.device).read::<u8>(0, &mut []));
        Ok(self.device.take_failure()?)
    }
}
