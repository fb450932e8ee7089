//! The CPU backend: vector kernels chosen at run time, one fork-join pool, large products through `gemm`.

mod attention;
mod elementwise;
mod kv_store;
mod linear;
mod matrix;
mod memory;
mod pool;
mod simd;
mod thread_group;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use self::attention::decode::{DecodeAttention, DecodeScratch, DecodeSpan, Keys};
use self::attention::prefill::PrefillAttention;
use self::kv_store::KvStore;
use self::matrix::Matrix;
pub(crate) use self::memory::Buffer;
pub(crate) use self::pool::Pool;
use self::pool::{SharedSlice, Turn};
use self::simd::Element;
pub use self::simd::Isa;
pub(crate) use self::thread_group::ThreadGroup;
use half::bf16;

use crate::backend::{
    AttentionArgs, AttentionShape, Backend, Bias, Cut, DType, Epilogue, HandOut, KvShape, Linear,
    Pass, Peak, RotateArgs, Span, random_spread,
};
use crate::checkpoint::Tensor;
use crate::crew::Crew;
use crate::error::EngineError;
use crate::sampling::most_probable;

/// This machine's cores.
pub(crate) struct CpuBackend {
    isa: Isa,
    pool: Arc<Pool>,
    scratch: Mutex<DecodeScratch>,
}

/// A weight: its matrix, and small vectors (norms, biases) widened to f32 once.
pub(crate) struct CpuWeight {
    matrix: Matrix,
    /// All elements as f32, for vectors.
    vector: Vec<f32>,
}

impl From<Matrix> for CpuWeight {
    fn from(matrix: Matrix) -> Self {
        let mut vector = Vec::new();
        if matrix.rows() == 1 {
            vector.resize(matrix.cols(), 0.0);
            matrix.row(0, &mut vector);
        }
        Self { matrix, vector }
    }
}

impl CpuBackend {
    /// A backend on the process's shared pool, made with `threads` threads (0: all cores) on first use.
    ///
    /// # Errors
    /// [`EngineError::InvalidArgument`] for an instruction set that this machine lacks.
    pub(crate) fn new(threads: usize, isa: Option<Isa>) -> Result<Self, EngineError> {
        Self::on(|| Pool::shared(threads), isa)
    }

    /// Backends for the ranks of one model, which share `threads` threads (0: all cores). Each has a pool of its own: ranks wait
    /// for each other within a forward, so they cannot take turns.
    ///
    /// # Errors
    /// As [`CpuBackend::new`].
    pub(crate) fn ranks(
        of: usize,
        threads: usize,
        isa: Option<Isa>,
    ) -> Result<Vec<Self>, EngineError> {
        let all = Pool::threads_for(threads);
        let pool = || Arc::new(Pool::new((all / of).max(1)));
        (0..of).map(|_| Self::on(pool, isa)).collect()
    }

    fn on(pool: impl FnOnce() -> Arc<Pool>, isa: Option<Isa>) -> Result<Self, EngineError> {
        let isa = isa.unwrap_or_else(Isa::detect);
        if !Isa::available().contains(&isa) {
            let reason = format!("this machine has no {isa:?}");
            return Err(EngineError::InvalidArgument {
                what: "instruction set",
                reason,
            });
        }
        Ok(Self {
            isa,
            pool: pool(),
            scratch: Mutex::new(DecodeScratch::new()),
        })
    }

    fn attend<E: Element>(
        &self,
        q: &[f32],
        pass: &Pass<'_>,
        args: &AttentionArgs<'_, Self>,
        wanted: &mut HandOut<'_>,
        out: &mut [f32],
    ) {
        let shape = args.shape;
        let kv = args.kv.layer::<E>(args.layer);
        let (q_width, out_width) = (
            shape.num_heads * kv.padded_dim,
            shape.num_heads * shape.head_dim,
        );
        if pass.bulk {
            for span in &pass.spans {
                let job = PrefillAttention {
                    kv,
                    blocks: span.blocks,
                    shape,
                    past: span.past,
                    tokens: span.rows.len(),
                    q: &q[span.rows.start * q_width..span.rows.end * q_width],
                    out: &mut out[span.rows.start * out_width..span.rows.end * out_width],
                };
                job.run(self.isa, &self.pool);
            }
            return;
        }
        let mut rest = out;
        let spans = pass.spans.iter().enumerate().map(|(index, span)| {
            let tokens = span.rows.len();
            let first_head = args.layer * shape.num_kv_heads;
            let heads = first_head..first_head + shape.num_kv_heads;
            let keys: Vec<Keys<'_>> = heads
                .map(|head| Keys::of(span.lists.as_ref(), head, span.past, tokens))
                .collect();
            let masses = wanted.masses.iter_mut().find(|m| m.span == index);
            let masses = masses.map(|masses| {
                let of_head = masses.of_head.iter_mut().zip(&keys);
                let slices = of_head.map(|(masses, keys)| {
                    masses.resize(keys.cached(), 0.0);
                    SharedSlice::new(masses)
                });
                slices.collect()
            });
            let capture = wanted.captures.iter_mut().find(|c| c.span == index);
            let capture = capture.map(|c| {
                let size = shape.num_heads * c.rows.kv_len;
                SharedSlice::new(&mut c.rows.probs[c.slot * size..(c.slot + 1) * size])
            });
            let (own, later) = std::mem::take(&mut rest).split_at_mut(tokens * out_width);
            rest = later;
            DecodeSpan {
                blocks: span.blocks,
                keys,
                q: &q[span.rows.start * q_width..span.rows.end * q_width],
                out: SharedSlice::new(own),
                capture,
                masses,
            }
        });
        let attention = DecodeAttention {
            kv,
            shape,
            spans: spans.collect(),
        };
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        attention.run(self.isa, &self.pool, &mut scratch);
    }

    fn rotate<E: Element>(
        &self,
        qkv: &[f32],
        pass: &Pass<'_>,
        args: &RotateArgs<'_, Self>,
        q: &mut [f32],
    ) {
        let norm = args
            .qk_norm
            .map(|(qn, kn, eps)| (qn.vector.as_slice(), kn.vector.as_slice(), eps));
        elementwise::RotateAndStore {
            qkv,
            angles: args.angles,
            shape: args.shape,
            norm,
            kv: args.kv.layer::<E>(args.layer),
            pass,
            q,
        }
        .run(self.isa, &self.pool);
    }
}

impl Backend for CpuBackend {
    type Buffer = Buffer;
    type Weight = CpuWeight;
    type Kv = KvStore;
    type Turn = Turn;

    fn begin(&self, _pass: &Pass<'_>, _shape: &AttentionShape, _crew: &mut Crew) -> Turn {
        self.pool.turn()
    }

    fn finish(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn weight(&self, tensor: Tensor) -> Result<CpuWeight, EngineError> {
        Ok(CpuWeight::from(Matrix::new(tensor)))
    }

    fn random_weight(
        &self,
        shape: &[usize],
        cut: &Cut,
        seed: u32,
    ) -> Result<CpuWeight, EngineError> {
        let matrix = match *shape {
            [rows, cols] => {
                let spread = random_spread(cols);
                let (own_rows, own_cols) = cut.of((rows, cols));
                let size = (own_rows.len(), own_cols.len());
                let indices = own_rows.flat_map(|row| {
                    let first = row * cols;
                    own_cols.clone().map(move |col| (first + col) as u64)
                });
                let bytes: Vec<u8> = indices
                    .flat_map(|index| random_number(index, seed, spread).to_le_bytes())
                    .collect();
                Matrix::from_bytes(&bytes, size, DType::Bf16)
            }
            _ => {
                let (own, _) = cut.of((shape.iter().product(), 1));
                let len = own.len();
                let ones = 1.0f32.to_le_bytes().repeat(len);
                Matrix::from_bytes(&ones, (1, len), DType::F32)
            }
        };
        Ok(CpuWeight::from(matrix))
    }

    fn device_memory(&self) -> Result<Option<(usize, usize)>, EngineError> {
        Ok(None)
    }

    fn buffer(&self) -> Buffer {
        Buffer::new()
    }

    fn kv(&self, shape: KvShape) -> Result<KvStore, EngineError> {
        Ok(KvStore::new(shape))
    }

    fn copy_blocks(&self, kv: &mut KvStore, copies: &[(u32, u32)]) -> Result<(), EngineError> {
        kv.copy_blocks(copies);
        Ok(())
    }

    fn embed(&self, table: &CpuWeight, pass: &Pass<'_>, out: &mut Buffer) {
        let width = table.matrix.cols();
        out.resize(pass.tokens.len() * width);
        for (row, &token) in out.chunks_exact_mut(width).zip(&pass.tokens) {
            table.matrix.row(token as usize, row);
        }
    }

    fn angles(&self, pass: &Pass<'_>, inverse_frequencies: &[f32], out: &mut Buffer) {
        let half = inverse_frequencies.len();
        out.resize(pass.positions.len() * 2 * half);
        for (row, &position) in out.chunks_exact_mut(2 * half).zip(&pass.positions) {
            for (i, &f) in inverse_frequencies.iter().enumerate() {
                let (sin, cos) = f64::from(position as f32 * f).sin_cos();
                row[i] = cos as f32;
                row[half + i] = sin as f32;
            }
        }
    }

    fn rms_norm(&self, x: &Buffer, weight: &CpuWeight, eps: f32, out: &mut Buffer) {
        out.resize(x.len());
        elementwise::rms_norm(self.isa, &self.pool, x, &weight.vector, eps, out);
    }

    fn gather_rows(&self, x: &Buffer, width: usize, pass: &Pass<'_>, out: &mut Buffer) {
        out.resize(pass.logit_rows.len() * width);
        for (out, &row) in out.chunks_exact_mut(width).zip(&pass.logit_rows) {
            out.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    }

    fn linear(
        &self,
        x: &Buffer,
        projections: &[&Linear<CpuWeight>],
        epilogue: Epilogue,
        bulk: bool,
        out: &mut Buffer,
    ) {
        let parts: Vec<(&Matrix, Option<&[f32]>)> = projections
            .iter()
            .map(|p| {
                (
                    &p.weight.matrix,
                    p.bias.as_ref().map(|b| b.vector.as_slice()),
                )
            })
            .collect();
        if epilogue != Epilogue::Add {
            out.resize(x.len() / parts[0].0.cols() * linear::Projection::width(&parts, epilogue));
        }
        linear::Projection {
            x,
            parts: &parts,
            epilogue,
            out,
        }
        .run(self.isa, &self.pool, bulk);
    }

    fn rotate_and_store(
        &self,
        qkv: &Buffer,
        pass: &Pass<'_>,
        args: &RotateArgs<'_, Self>,
        q: &mut Buffer,
    ) {
        q.resize(pass.tokens.len() * args.shape.num_heads * args.kv.padded_dim());
        match args.kv.dtype() {
            DType::F32 => self.rotate::<f32>(qkv, pass, args, q),
            DType::Bf16 => self.rotate::<half::bf16>(qkv, pass, args, q),
            DType::F16 => self.rotate::<half::f16>(qkv, pass, args, q),
        }
    }

    fn attention(
        &self,
        q: &Buffer,
        pass: &Pass<'_>,
        args: &AttentionArgs<'_, Self>,
        wanted: &mut HandOut<'_>,
        out: &mut Buffer,
    ) {
        out.resize(pass.tokens.len() * args.shape.num_heads * args.shape.head_dim);
        match args.kv.dtype() {
            DType::F32 => self.attend::<f32>(q, pass, args, wanted, out),
            DType::Bf16 => self.attend::<half::bf16>(q, pass, args, wanted, out),
            DType::F16 => self.attend::<half::f16>(q, pass, args, wanted, out),
        }
    }

    fn keys(
        &self,
        kv: &KvStore,
        layer: usize,
        blocks: &[u32],
        len: usize,
    ) -> Option<(Vec<f32>, usize)> {
        let keys = match kv.dtype() {
            DType::F32 => kv.keys::<f32>(layer, blocks, len),
            DType::Bf16 => kv.keys::<half::bf16>(layer, blocks, len),
            DType::F16 => kv.keys::<half::f16>(layer, blocks, len),
        };
        Some((keys, kv.padded_dim()))
    }

    fn read(&self, x: &Buffer, out: &mut Vec<f32>) -> Result<(), EngineError> {
        out.clear();
        out.extend_from_slice(x);
        Ok(())
    }

    fn argmax(
        &self,
        x: &mut Buffer,
        width: usize,
        biases: &[Bias],
        out: &mut Vec<Option<Peak>>,
    ) -> Result<(), EngineError> {
        for bias in biases {
            x[bias.row as usize * width + bias.column as usize] += bias.value;
        }
        let logits = &**x;
        let rows = logits.len() / width;
        out.clear();
        out.resize(rows, None);
        let peaks = SharedSlice::new(out);
        self.pool.run(rows, &|index| {
            let row = &logits[index * width..][..width];
            let peak = most_probable(row).map(|column| Peak {
                column,
                value: row[column as usize],
            });
            // SAFETY: every row has its own peak.
            let own = unsafe { peaks.range(index, 1) };
            own[0] = peak;
        });
        Ok(())
    }

    fn read_parts(
        &self,
        x: &Buffer,
        parts: &mut [(Range<usize>, &mut [f32])],
        crew: &mut Crew,
    ) -> Result<(), EngineError> {
        let x = &**x;
        crew.for_each(parts, |(elements, out)| {
            out.copy_from_slice(&x[elements.clone()]);
        });
        Ok(())
    }
}

/// Element `index` of a random matrix, uniform in ±spread: the number that the GPU's kernel `fill_random` makes.
fn random_number(index: u64, seed: u32, spread: f32) -> bf16 {
    let mut h = (index as u32).wrapping_mul(2_654_435_761)
        ^ ((index >> 32) as u32).wrapping_mul(40_503)
        ^ seed;
    h = (h ^ (h >> 16)).wrapping_mul(2_246_822_519);
    h = (h ^ (h >> 13)).wrapping_mul(3_266_489_917);
    h ^= h >> 16;
    bf16::from_f32((h as f32 * (1.0 / 2_147_483_648.0) - 1.0) * spread)
}

/// Where row `row` of a pass belongs: its span.
fn span_of<'a, 'p>(pass: &'a Pass<'p>, row: usize) -> &'a Span<'p> {
    let index = pass.spans.partition_point(|s| s.rows.end <= row);
    &pass.spans[index]
}
