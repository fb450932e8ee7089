//! One attention problem: sequences of given lengths in a paged cache, queries, lists.

use anyhow::Result;
use specattn_engine::Crew;
use specattn_engine::backend::{
    AttentionArgs, AttentionShape, Backend, DType, HandOut, KvShape, Pass, RotateArgs, Span,
};
use specattn_engine::cuda::{Buffer, CudaBackend, KvStore};
use specattn_engine::kv_cache::BLOCK_TOKENS;
use specattn_engine::{HeadLists, SpanLists};

use super::numbers::Numbers;

/// One sequence of a case.
#[derive(Debug, Clone)]
pub struct SpanCase {
    /// Positions cached before the pass.
    pub past: usize,
    /// The pass's tokens.
    pub tokens: usize,
    /// Which positions to read, or all.
    pub lists: Option<HeadLists>,
    blocks: Vec<u32>,
}

/// Sequences whose blocks lie in random order.
#[derive(Debug)]
pub struct AttentionCase {
    /// Heads and width.
    pub shape: AttentionShape,
    /// Sequences.
    pub spans: Vec<SpanCase>,
    /// Layers of the store.
    pub layers: usize,
    num_blocks: usize,
}

impl AttentionCase {
    /// A case of (past, tokens) sequences.
    pub fn new(
        shape: AttentionShape,
        lengths: &[(usize, usize)],
        layers: usize,
        numbers: &mut Numbers,
    ) -> Self {
        let count = |&(past, tokens): &(usize, usize)| (past + tokens).div_ceil(BLOCK_TOKENS);
        // A spare block, so that a wrong table entry does not hide.
        let num_blocks = lengths.iter().map(count).sum::<usize>() + 1;
        let mut free = numbers.shuffled(num_blocks);
        let spans = lengths
            .iter()
            .map(|length| SpanCase {
                past: length.0,
                tokens: length.1,
                lists: None,
                blocks: free.split_off(free.len() - count(length)),
            })
            .collect();
        Self {
            shape,
            spans,
            layers,
            num_blocks,
        }
    }

    /// Gives every sequence random lists that keep about `kept` of its positions: one for all heads, or one for each.
    pub fn keep(&mut self, kept: f32, per_head: bool, numbers: &mut Numbers) {
        let heads = self.layers * self.shape.num_kv_heads;
        for span in &mut self.spans {
            let count = if per_head { heads } else { 1 };
            let lists = (0..count)
                .map(|_| {
                    (0..span.past)
                        .filter(|_| numbers.uniform() < kept)
                        .collect()
                })
                .collect();
            let of_head = (0..heads as u32)
                .map(|h| if per_head { h } else { 0 })
                .collect();
            span.lists = Some(HeadLists { lists, of_head });
        }
    }

    /// KV memory for the case.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn store(&self, backend: &CudaBackend, dtype: DType) -> Result<KvStore> {
        Ok(backend.kv(KvShape {
            num_layers: self.layers,
            num_kv_heads: self.shape.num_kv_heads,
            head_dim: self.shape.head_dim,
            num_blocks: self.num_blocks,
            dtype,
        })?)
    }

    /// The pass of the case's tokens.
    pub fn pass(&self, bulk: bool) -> Pass<'_> {
        self.pass_of(|span| (span.past, span.tokens), bulk)
    }

    /// The pass that writes what is cached before.
    pub fn past_pass(&self) -> Pass<'_> {
        self.pass_of(|span| (0, span.past), true)
    }

    /// A pass over all positions that the case's blocks have.
    pub fn whole_blocks_pass(&self) -> Pass<'_> {
        self.pass_of(|span| (0, span.blocks.len() * BLOCK_TOKENS), true)
    }

    fn pass_of(&self, part: impl Fn(&SpanCase) -> (usize, usize), bulk: bool) -> Pass<'_> {
        let mut pass = Pass {
            tokens: Vec::new(),
            positions: Vec::new(),
            spans: Vec::new(),
            logit_rows: Vec::new(),
            captures: Vec::new(),
            selections: Vec::new(),
            bulk,
        };
        for span in &self.spans {
            let (past, tokens) = part(span);
            let start = pass.tokens.len();
            pass.tokens.resize(start + tokens, 0);
            pass.positions
                .extend((past..past + tokens).map(|p| p as u32));
            pass.spans.push(Span {
                rows: start..start + tokens,
                past,
                blocks: &span.blocks,
                lists: span.lists.as_ref().map(SpanLists::from),
            });
        }
        pass
    }

    /// Stores projected rows of `pass` in `layer` without rotation; the queries go to `q`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn store_rows(
        &self,
        backend: &CudaBackend,
        (kv, layer): (&KvStore, usize),
        pass: &Pass<'_>,
        qkv: &[f32],
        q: &mut Buffer,
    ) -> Result<()> {
        let qkv = backend.buffer_of(qkv)?;
        let mut angles = backend.buffer();
        let _turn = backend.begin(pass, &self.shape, &mut Crew::alone());
        // Frequencies of 0: every angle is 0 and rotation the identity.
        backend.angles(pass, &vec![0.0; self.shape.head_dim / 2], &mut angles);
        let args = RotateArgs {
            shape: self.shape,
            qk_norm: None,
            angles: &angles,
            kv,
            layer,
        };
        backend.rotate_and_store(&qkv, pass, &args, q);
        Ok(backend.finish()?)
    }

    /// Attention over the batch that the backend was told last.
    pub fn attend(
        &self,
        backend: &CudaBackend,
        (kv, layer): (&KvStore, usize),
        pass: &Pass<'_>,
        (q, out): (&Buffer, &mut Buffer),
        wanted: &mut HandOut<'_>,
    ) {
        let args = AttentionArgs {
            shape: self.shape,
            kv,
            layer,
        };
        backend.attention(q, pass, &args, wanted, out);
    }
}
