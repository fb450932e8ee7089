//! The seam between the transformer and a device.
//!
//! [`Backend`] is what a device must do; [`Pass`] tells it what one forward processes. Dense and masked attention are
//! one operation whose [`Span`]s carry an index list or none, so the CPU is the oracle for both.

use std::ops::Range;

use crate::attention::{AttentionRows, SpanLists};
use crate::checkpoint::Tensor;
use crate::crew::Crew;
use crate::error::EngineError;
use crate::row_selection::{RowSelection, SelectedRows};
pub use crate::share::Cut;

/// Number types of stored weights and KV entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl DType {
    /// Bytes per element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// The size of a KV store.
#[derive(Debug, Clone, Copy)]
pub struct KvShape {
    /// Transformer layers.
    pub num_layers: usize,
    /// KV heads per layer.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Blocks of [`crate::kv_cache::BLOCK_TOKENS`] positions.
    pub num_blocks: usize,
    /// What entries are stored as.
    pub dtype: DType,
}

/// One sequence's rows in a pass.
#[derive(Debug)]
pub struct Span<'a> {
    /// Its rows among the pass's tokens.
    pub rows: Range<usize>,
    /// Positions cached before the pass: the first row's position.
    pub past: usize,
    /// Its block table.
    pub blocks: &'a [u32],
    /// Which cached positions to read; `None` for all.
    pub lists: Option<SpanLists<'a>>,
}

impl Span<'_> {
    /// KV entries that its rows read, over all of the `heads` KV heads of all layers.
    pub(crate) fn entries(&self, heads: usize) -> u64 {
        let cached = match &self.lists {
            None => heads * self.past,
            Some(lists) => (0..heads).map(|head| lists.of(head).len()).sum(),
        };
        (cached + heads * self.rows.len()) as u64
    }
}

/// The tokens of one forward, laid out as consecutive rows.
#[derive(Debug)]
pub struct Pass<'a> {
    /// Token ids; `[rows]`.
    pub tokens: Vec<u32>,
    /// Positions; `[rows]`.
    pub positions: Vec<u32>,
    /// Whose rows are whose.
    pub spans: Vec<Span<'a>>,
    /// Rows that get logits, in order.
    pub logit_rows: Vec<usize>,
    /// Spans of whose attention something is handed out, in order.
    pub captures: Vec<usize>,
    /// Those of them from whose last row is selected, and what; never in a bulk pass.
    pub selections: Vec<(usize, &'a RowSelection)>,
    /// A single long dense span: the device may use kernels made for many rows.
    pub bulk: bool,
}

impl<'a> Pass<'a> {
    /// The same pass of one span, reading `lists`.
    pub(crate) fn reading<'b>(&self, lists: SpanLists<'b>) -> Pass<'b>
    where
        'a: 'b,
    {
        let [span] = &self.spans[..] else {
            unreachable!("a chooser's pass has one span");
        };
        let span = Span {
            rows: span.rows.clone(),
            past: span.past,
            blocks: span.blocks,
            lists: Some(lists),
        };
        Pass {
            tokens: self.tokens.clone(),
            positions: self.positions.clone(),
            spans: vec![span],
            logit_rows: self.logit_rows.clone(),
            captures: self.captures.clone(),
            selections: Vec::new(),
            bulk: false,
        }
    }
}

/// The shape of attention in every layer.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// KV heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What [`Backend::linear`] does with its products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// Projections side by side: `out[row] = [x·W1ᵀ + b1 | x·W2ᵀ + b2 | …]`.
    Store,
    /// One projection added to `out`.
    Add,
    /// Two projections, gate and up: `out = silu(x·W1ᵀ + b1) ⊙ (x·W2ᵀ + b2)`.
    SwiGlu,
}

/// A projection's weights on a device.
#[derive(Debug)]
pub struct Linear<W> {
    /// `[out, in]`, row-major, in its stored type.
    pub weight: W,
    /// `[out]`.
    pub bias: Option<W>,
}

/// Half the range of a random matrix's elements: products of normed rows with it keep a size near 1.
pub(crate) fn random_spread(inputs: usize) -> f32 {
    (3.0 / inputs as f32).sqrt()
}

/// A device. Activations are row-major, `[rows, width]`.
///
/// Operations of a pass run in order, between [`Backend::begin`] and [`Backend::finish`]. They may run behind the caller's back, so
/// they return nothing: the first failure is reported by `read` or `finish`.
pub trait Backend: Send {
    /// Device memory for activations.
    type Buffer: Send;
    /// A weight matrix or vector on the device.
    type Weight: Send;
    /// KV memory of all layers.
    type Kv: Send;
    /// The right to use the device, until dropped.
    type Turn;

    /// Waits until this model may use the device, held for the length of a forward, and tells it what the pass is: all
    /// that later operations need to know beside their buffers. Models that share a device take turns. `crew` may help to put the
    /// lists of many sessions in place.
    fn begin(&self, pass: &Pass<'_>, shape: &AttentionShape, crew: &mut Crew) -> Self::Turn;
    /// Waits for everything that was asked for since [`Backend::begin`].
    ///
    /// # Errors
    /// The first failure of the pass that no `read` has reported.
    fn finish(&self) -> Result<(), EngineError>;
    /// Brings a tensor to the device.
    ///
    /// # Errors
    /// When the device has no room for it.
    fn weight(&self, tensor: Tensor) -> Result<Self::Weight, EngineError>;
    /// The part that `cut` takes of a weight of that shape, made up on the device, for benchmarks: vectors of ones, small
    /// pseudo-random matrices.
    ///
    /// # Errors
    /// When the device has no room for it, or cannot make any.
    fn random_weight(
        &self,
        shape: &[usize],
        cut: &Cut,
        seed: u32,
    ) -> Result<Self::Weight, EngineError>;
    /// (free, total) bytes of the device's own memory; `None` where it is the host's.
    ///
    /// # Errors
    /// When the device does not answer.
    fn device_memory(&self) -> Result<Option<(usize, usize)>, EngineError>;
    /// An activation buffer, empty until sized by an operation.
    fn buffer(&self) -> Self::Buffer;
    /// KV memory.
    ///
    /// # Errors
    /// When the device has no room for it.
    fn kv(&self, shape: KvShape) -> Result<Self::Kv, EngineError>;
    /// Copies all layers' entries of KV blocks, each (from, to), one after another; what later passes read is there then.
    ///
    /// # Errors
    /// When the device fails.
    fn copy_blocks(&self, kv: &mut Self::Kv, copies: &[(u32, u32)]) -> Result<(), EngineError>;

    /// Makes ready what forwards of a model of this shape may need, so that none of them waits for it.
    ///
    /// # Errors
    /// When the device cannot.
    fn prepare(&self, _shape: &AttentionShape) -> Result<(), EngineError> {
        Ok(())
    }

    /// `out[row] = table[tokens[row]]`.
    fn embed(&self, table: &Self::Weight, pass: &Pass<'_>, out: &mut Self::Buffer);
    /// Cosines and sines of every row's rotary angles: `[rows, head_dim]`, the first half cosines, the second sines. An angle is an f32 product
    /// of position and inverse frequency.
    fn angles(&self, pass: &Pass<'_>, inverse_frequencies: &[f32], out: &mut Self::Buffer);
    /// Root-mean-square norm of every row (Zhang and Sennrich 2019).
    fn rms_norm(&self, x: &Self::Buffer, weight: &Self::Weight, eps: f32, out: &mut Self::Buffer);
    /// The rows of `x` that get logits, one after another.
    fn gather_rows(&self, x: &Self::Buffer, width: usize, pass: &Pass<'_>, out: &mut Self::Buffer);
    /// Projections of every row. With `bulk` false a row's result has the same bits whatever other rows there are.
    fn linear(
        &self,
        x: &Self::Buffer,
        projections: &[&Linear<Self::Weight>],
        epilogue: Epilogue,
        bulk: bool,
        out: &mut Self::Buffer,
    );
    /// Splits `qkv` rows, norms q and k per head where `qk_norm` is given, rotates them, stores K and V in the cache.
    /// The rotated, scaled queries go to `q`.
    fn rotate_and_store(
        &self,
        qkv: &Self::Buffer,
        pass: &Pass<'_>,
        args: &RotateArgs<'_, Self>,
        q: &mut Self::Buffer,
    );
    /// Attention of every row over its span's cache; `out` is `[rows, num_heads * head_dim]`. What is `wanted` of it
    /// besides is handed out, masses perhaps only by [`Backend::masses`]; never in a bulk pass.
    fn attention(
        &self,
        q: &Self::Buffer,
        pass: &Pass<'_>,
        args: &AttentionArgs<'_, Self>,
        wanted: &mut HandOut<'_>,
        out: &mut Self::Buffer,
    );
    /// Keys of positions `0..len` of a block table on the host, `[num_kv_heads, len, width]`, and the width: head_dim,
    /// padded. For [`crate::KeyChooser`]s only; `None` where the device does not offer it.
    fn keys(
        &self,
        _kv: &Self::Kv,
        _layer: usize,
        _blocks: &[u32],
        _len: usize,
    ) -> Option<(Vec<f32>, usize)> {
        None
    }
    /// Whether [`Backend::select`] takes rows of `kv_len` positions.
    fn selects(&self, _kv_len: usize) -> bool {
        false
    }
    /// After the last layer's attention: the selections of [`Pass::selections`], in order, each as long as its span reaches. `crew`
    /// may help to hand them out.
    ///
    /// # Errors
    /// The first failure of the pass.
    fn select(
        &self,
        _pass: &Pass<'_>,
        _out: &mut [&mut SelectedRows],
        _crew: &mut Crew,
    ) -> Result<(), EngineError> {
        Ok(())
    }
    /// After the last layer: fills in, for all layers at once, the masses that [`Backend::attention`] has left on the device.
    ///
    /// # Errors
    /// The first failure of the pass.
    fn masses(&self, _pass: &Pass<'_>, _out: &mut [Masses<'_>]) -> Result<(), EngineError> {
        Ok(())
    }
    /// The first of the largest entries of every row of `width`, after adding `biases`; `None` for a row that holds a NaN or an
    /// infinity. The device may add them to `x` itself.
    ///
    /// # Errors
    /// The first failure of the pass.
    fn argmax(
        &self,
        x: &mut Self::Buffer,
        width: usize,
        biases: &[Bias],
        out: &mut Vec<Option<Peak>>,
    ) -> Result<(), EngineError>;
    /// Copies a buffer to the host, as f32.
    ///
    /// # Errors
    /// The first failure of the pass.
    fn read(&self, x: &Self::Buffer, out: &mut Vec<f32>) -> Result<(), EngineError>;
    /// Copies parts of an f32 buffer to the host, in order: each range of elements to a place of its length. `crew` may help.
    ///
    /// # Errors
    /// The first failure of the pass.
    fn read_parts(
        &self,
        x: &Self::Buffer,
        parts: &mut [(Range<usize>, &mut [f32])],
        crew: &mut Crew,
    ) -> Result<(), EngineError>;
}

/// What is added to an entry of a row before [`Backend::argmax`] looks at it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Bias {
    /// The row.
    pub row: u32,
    /// Its entry.
    pub column: u32,
    /// What is added.
    pub value: f32,
}

/// A row's largest entry.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Peak {
    /// Its column.
    pub column: u32,
    /// Its value.
    pub value: f32,
}

/// What [`Backend::rotate_and_store`] needs besides the rows.
pub struct RotateArgs<'a, B: Backend + ?Sized> {
    /// Head counts and width.
    pub shape: AttentionShape,
    /// Norm weights of q and k heads (Qwen3), `[head_dim]` each, and their epsilon.
    pub qk_norm: Option<(&'a B::Weight, &'a B::Weight, f32)>,
    /// What [`Backend::angles`] wrote.
    pub angles: &'a B::Buffer,
    /// The cache.
    pub kv: &'a B::Kv,
    /// Which layer's.
    pub layer: usize,
}

/// What [`Backend::attention`] needs besides the rows.
pub struct AttentionArgs<'a, B: Backend + ?Sized> {
    /// Head counts and width.
    pub shape: AttentionShape,
    /// The cache.
    pub kv: &'a B::Kv,
    /// Which layer's.
    pub layer: usize,
}

/// What attention hands out of one layer besides its output.
#[derive(Debug, Default)]
pub struct HandOut<'a> {
    /// Rows of the last token of some spans.
    pub captures: Vec<Capture<'a>>,
    /// Masses of the entries that some spans read.
    pub masses: Vec<Masses<'a>>,
}

/// Where masses go.
#[derive(Debug)]
pub struct Masses<'a> {
    /// Index into [`Pass::spans`].
    pub span: usize,
    /// Per KV head of the layer: for each cached position that it reads, in order, the mean of its probability over the
    /// span's rows and the head's query heads.
    pub of_head: &'a mut [Vec<f32>],
}

/// Where captured attention rows go.
#[derive(Debug)]
pub struct Capture<'a> {
    /// Index into [`Pass::spans`].
    pub span: usize,
    /// Index of the layer among the captured ones.
    pub slot: usize,
    /// The rows.
    pub rows: &'a mut AttentionRows,
}
