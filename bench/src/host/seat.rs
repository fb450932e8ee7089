//! [`Seat`]: one session of both workers, reduced to what its host does between forwards in a round.

use std::hint::black_box;
use std::sync::Arc;

use anyhow::{Result, ensure};
use specattn_draft::{OwnPolicy, OwnReads, RowSelector};
use specattn_engine::sampling::{
    Candidate, CounterRng, DraftToken, History, Sampler, SamplingParams, check_draft, draft_token,
    verify_round,
};
use specattn_engine::{HeadLists, PositionSet, SelectedRows, SpanLists};
use specattn_mask::{Encoder, LayerMap, MaskPolicy};
use specattn_verify::{MaskReader, Masking};

use super::selections::Selections;

/// Entries of a proposed token's distribution.
const Q_ENTRIES: usize = 256;

/// The pair, the load and the masks.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// (layers, query heads, KV heads) of the draft.
    pub draft: (usize, usize, usize),
    /// (layers, KV heads) of the target.
    pub target: (usize, usize),
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Tokens of context before the first round.
    pub context: usize,
    /// Draft tokens per round, the first of which is captured.
    pub draft_length: usize,
    /// Share of positions that a mask's source selects.
    pub kept: f64,
    /// Share of positions that a KV head of the draft selects for itself.
    pub own_kept: f64,
    /// Chance that a position's bit stays from round to round.
    pub repeat: f64,
}

/// A part of a round's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Draft: a captured step's bits become what masks are made of, and the lists of the draft's own reads.
    Selections,
    /// Draft: the lists of the steps between captured ones, as the engine takes them.
    OwnLists,
    /// Draft: the round's mask becomes bytes.
    Encode,
    /// Draft: its tokens are drawn from rows of the vocabulary.
    Draw,
    /// Target: the mask's bytes become the lists of its KV heads.
    Decode,
    /// Target: those lists as the engine takes them.
    Lists,
    /// Target: the round is judged by rows of the vocabulary.
    Judge,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 7] = [
        Self::Selections,
        Self::OwnLists,
        Self::Encode,
        Self::Draw,
        Self::Decode,
        Self::Lists,
        Self::Judge,
    ];

    /// A line of the table.
    pub fn label(self) -> &'static str {
        match self {
            Self::Selections => "draft: bits to selections",
            Self::OwnLists => "draft: own lists to the engine",
            Self::Encode => "draft: mask to bytes",
            Self::Draw => "draft: drawing, sampled",
            Self::Decode => "target: bytes to lists",
            Self::Lists => "target: lists to the engine",
            Self::Judge => "target: judging, sampled",
        }
    }
}

/// A session, on both sides.
#[derive(Debug)]
pub struct Seat {
    shape: Shape,
    rows: RowSelector,
    encoder: Encoder,
    own: OwnReads,
    selections: Selections,
    selected: SelectedRows,
    bytes: Vec<u8>,
    reader: MaskReader,
    samplers: [Sampler; 2],
    rng: CounterRng,
    /// Tokens so far; their ids say nothing.
    tokens: Vec<u32>,
    draft: Vec<DraftToken>,
    /// `[vocab_size]`
    logits: Arc<[f32]>,
}

impl Seat {
    /// Session number `seed`, whose distributions all come from `logits`.
    ///
    /// # Errors
    /// When the shape makes no sense.
    pub fn new(shape: Shape, logits: Arc<[f32]>, seed: u64) -> Result<Self> {
        let (layers, heads, kv_heads) = shape.draft;
        let map = LayerMap::proportional(
            shape.target.0 as u32,
            shape.target.1 as u32,
            layers as u32,
            heads as u32,
        );
        let policy = MaskPolicy {
            p: shape.kept as f32,
            ..MaskPolicy::default()
        };
        let mut shares = vec![shape.kept; map.sources.len()];
        shares.resize(shares.len() + layers * kv_heads, shape.own_kept);
        let params = || SamplingParams {
            temperature: 0.8,
            seed,
            ..SamplingParams::default()
        };
        let sampler = || Sampler::new(params(), shape.vocab_size);
        ensure!(
            logits.len() == shape.vocab_size,
            "a row holds the vocabulary"
        );
        Ok(Self {
            rows: RowSelector::new(policy, map.sources.clone()),
            encoder: Encoder::new(),
            own: OwnReads::new(OwnPolicy::default(), &policy, kv_heads),
            selections: Selections::new(shares, shape.repeat, seed),
            selected: SelectedRows::default(),
            bytes: Vec::new(),
            reader: MaskReader::new(Arc::new(map), policy, 4 * shape.context),
            samplers: [sampler()?, sampler()?],
            rng: CounterRng::for_draft(seed),
            tokens: vec![1; shape.context],
            draft: Vec::new(),
            logits,
            shape,
        })
    }

    /// Bytes of the last mask.
    pub fn mask_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Whether both sides have come to the same lists.
    pub fn check(&self) -> Result<()> {
        let kept = |lists: &HeadLists| lists.lists.iter().map(PositionSet::count).sum::<usize>();
        let found = kept(self.reader.lists()) as f64;
        let all = (self.reader.lists().lists.len() * self.tokens.len()) as f64;
        let wanted = self.shape.kept;
        ensure!(
            (found / all - wanted).abs() < 0.05,
            "{} of the entries are kept, not {wanted}",
            found / all
        );
        Ok(())
    }

    /// Makes what a GPU would hand out in the next round; no part of what is timed.
    pub fn begin_round(&mut self) {
        let length = self.tokens.len() + self.shape.draft_length + 1;
        self.tokens.resize(length, 1);
        self.selected = self.selections.next(length);
    }

    /// Does a part of the round.
    ///
    /// # Panics
    /// When the sides do not understand each other.
    pub fn run(&mut self, part: Part) {
        let n = self.tokens.len();
        match part {
            Part::Selections => {
                self.rows.begin(n - 1);
                self.rows.add_selected(&self.selected);
                self.own.selected(&self.selected, self.rows.num_sources());
            }
            Part::OwnLists => {
                for step in 1..self.shape.draft_length {
                    self.own.passed();
                    self.own.fit(n + step);
                    black_box(SpanLists::from(self.own.lists()).longest());
                }
            }
            Part::Encode => self.bytes = self.encoder.encode(self.rows.finish()),
            Part::Draw => self.draw(),
            Part::Decode => {
                let read = self.reader.read(&self.bytes, n);
                assert_eq!(read, Ok(Masking::Ready));
            }
            Part::Lists => {
                black_box(SpanLists::from(self.reader.lists()).longest());
            }
            Part::Judge => self.judge(),
        }
    }

    fn draw(&mut self) {
        self.draft.clear();
        let prompt = &self.tokens;
        for index in 0..self.shape.draft_length {
            let history = History {
                prompt,
                output: &[],
                pending: &[],
            };
            let distribution = self.samplers[0].distribution(&self.logits, history);
            let distribution = distribution.expect("the row is finite");
            let position = (self.tokens.len() + index) as u64;
            let (token, q) = draft_token(&distribution, Q_ENTRIES, &self.rng, position);
            self.draft.push(DraftToken { token, q: Some(q) });
        }
    }

    fn judge(&mut self) {
        let (n, vocab) = (self.tokens.len() as u64, self.shape.vocab_size);
        check_draft(&self.draft, false, vocab, &self.rng, n).expect("the draft is honest");
        let rows = (0..=self.draft.len()).map(|_| {
            let history = History {
                prompt: &self.tokens,
                output: &[],
                pending: &[],
            };
            let distribution = self.samplers[1].distribution(&self.logits, history);
            distribution.expect("the row is finite")
        });
        let target: Vec<_> = rows.collect();
        let candidates: Vec<Candidate<'_>> = self.draft.iter().map(Candidate::from).collect();
        black_box(verify_round(&target, &candidates, &self.rng, &self.tokens));
    }
}
