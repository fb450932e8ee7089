//! [`Replay`]: a session's target forwards, run again from outside over what crossed between its workers.
//!
//! What a masked forward reads depends on what earlier ones found heavy, which no message tells. So the forwards are
//! repeated, with the engine and the mask library but without any of the workers' code: every list that a head read, every
//! entry counted, and the logits that tokens were drawn from.

use std::collections::VecDeque;

use specattn_engine::{HeadLists, LoadOptions, LogitRows, Model, Sequence, Step};
use specattn_mask::memory::shifted_mass;
use specattn_mask::{
    Decoder, HeadMemory, LayerMap, Limits, MaskPolicy, PositionSet, RoundMask, read_list,
};
use specattn_proto::v1::{OpenRequest, Propose, Verdict};

use crate::count::Count;
use crate::process;
use crate::proxy::Crossed;

/// Prompt tokens per forward, as the verify worker processes them.
const CHUNK: usize = 512;

/// One session, replayed.
#[derive(Debug)]
pub struct Replay {
    /// What was read.
    pub count: Count,
    /// Of masked passes: the index of the token that a row decides, and the row.
    pub masked_rows: Vec<(usize, Vec<f32>)>,
    model: Model,
    sequence: Sequence,
    map: LayerMap,
    policy: MaskPolicy,
    memory: Vec<HeadMemory>,
    /// A draft is there: the target remembers from here on.
    remembers: bool,
    tokens: Vec<u32>,
    /// Tokens at the end that no dense pass has seen.
    run: usize,
    /// The run's length at which it is refreshed; `None`: never.
    length: Option<usize>,
}

/// A round as proposed.
struct Round<'a> {
    propose: &'a Propose,
    drafted: Vec<u32>,
    mask: Option<RoundMask>,
}

impl Replay {
    /// Replays a session in sparse mode by `crossed`; `committed` are its tokens, prompt included, at the end.
    pub fn of(
        crossed: &[Crossed],
        request: &OpenRequest,
        committed: &[u32],
        map: LayerMap,
    ) -> Self {
        let options = LoadOptions {
            kv_cache_bytes: 256 << 20,
            threads: 1,
            ..LoadOptions::default()
        };
        let model = Model::load(&process::target(), &options, &mut |_, _| {}).unwrap();
        let heads = map.of_head.iter().flatten().count();
        let check = request.check.unwrap_or_default();
        let mask = request.mask.unwrap();
        let mut replay = Self {
            count: Count::default(),
            masked_rows: Vec::new(),
            sequence: model.new_sequence(committed.len()).unwrap(),
            model,
            policy: MaskPolicy {
                p: mask.mask_p.unwrap(),
                sink_tokens: mask.sink_tokens.unwrap(),
                window_tokens: mask.window_tokens.unwrap(),
                granularity: mask.granularity.unwrap(),
            },
            memory: vec![HeadMemory::default(); heads],
            remembers: false,
            map,
            tokens: request.token_ids.clone(),
            run: 0,
            length: check.refresh_every.map(|n| n as usize),
        };
        let prompt = replay.tokens.clone();
        for chunk in prompt[..prompt.len() - 1].chunks(CHUNK) {
            replay.step(chunk, None, LogitRows::None);
        }
        replay.follow(crossed, committed);
        assert_eq!(
            replay.tokens.len(),
            committed.len(),
            "every token is accounted for"
        );
        replay
    }

    fn follow(&mut self, crossed: &[Crossed], committed: &[u32]) {
        let mut decoder = Decoder::new(Limits::default());
        let mut drafted: Vec<u32> = Vec::new();
        // A step alone is told while a proposal is under way: the verdict that answers it comes behind.
        let mut waiting: VecDeque<Round<'_>> = VecDeque::new();
        for event in crossed {
            match event {
                Crossed::Welcome(welcome) => {
                    self.alone(&welcome.token_ids);
                    self.remembers = true;
                    let p = welcome.mask.and_then(|mask| mask.mask_p);
                    self.policy.p = p.unwrap_or(self.policy.p);
                }
                Crossed::Propose(propose) => {
                    drafted.truncate(propose.offset as usize);
                    drafted.extend(&propose.token_ids);
                    // A round may come in parts, the mask with its last.
                    if propose.last {
                        let mask = decoder.decode(&propose.mask).ok().cloned();
                        let drafted = drafted.clone();
                        waiting.push_back(Round {
                            propose,
                            drafted,
                            mask,
                        });
                    }
                }
                Crossed::Verdict(verdict) => {
                    if verdict.judged {
                        let base = self.tokens.len() as u64;
                        while waiting
                            .front()
                            .is_some_and(|round| round.propose.base != base)
                        {
                            waiting.pop_front();
                        }
                        let round = waiting.pop_front();
                        self.answered(round.expect("what is judged was proposed"), verdict);
                    } else {
                        self.alone(&verdict.next_tokens);
                    }
                    self.policy.p = verdict.mask_p.unwrap_or(self.policy.p);
                }
                Crossed::Closed => {
                    let base = self.tokens.len() as u64;
                    let mut rest = waiting.drain(..);
                    self.ended(rest.find(|round| round.propose.base == base), committed);
                }
            }
        }
    }

    /// KL(dense ‖ masked), nats, of every committed token that a masked pass drew, by one full dense pass over the text;
    /// for sessions whose masked passes commit.
    pub fn divergences(&mut self) -> Vec<f64> {
        let tokens = self.tokens.clone();
        self.sequence.truncate(0);
        self.remembers = false;
        let vocab = self.model.config().vocab_size;
        let mut divergences = Vec::new();
        let mut rows = std::mem::take(&mut self.masked_rows).into_iter().peekable();
        for chunk in tokens.chunks(CHUNK) {
            let first = self.sequence.len();
            let dense = self.step(chunk, None, LogitRows::All);
            // A row follows its token and decides the next one.
            let until = first + chunk.len() + 1;
            while let Some((index, masked)) = rows.next_if(|row| row.0 < until) {
                let dense = &dense[(index - 1 - first) * vocab..][..vocab];
                divergences.push(divergence(dense, &masked));
            }
        }
        divergences
    }

    fn is_due(&self) -> bool {
        self.length.is_some_and(|length| self.run >= length)
    }

    fn answered(&mut self, round: Round<'_>, verdict: &Verdict) {
        let accepted = verdict.accepted as usize;
        let (drafted, mask) = (round.drafted, round.mask);
        self.round(&drafted, mask, &drafted[..accepted], verdict.next_tokens[0]);
    }

    /// The last pass's answer is the end itself.
    fn ended(&mut self, last: Option<Round<'_>>, committed: &[u32]) {
        let (n, limit) = (self.tokens.len(), committed.len());
        let left = &committed[n..];
        let Some(round) = last.filter(|_| left.len() > 1) else {
            return self.alone(left);
        };
        let mut drafted = round.drafted;
        drafted.truncate(left.len() - 1);
        let (accepted, next) = (&committed[n..limit - 1], committed[limit - 1]);
        self.round(&drafted, round.mask, accepted, next);
    }

    /// A round of which `accepted` came, and `next`: dense where a pass over the run is due, or there is no mask.
    fn round(&mut self, drafted: &[u32], mask: Option<RoundMask>, accepted: &[u32], next: u32) {
        match mask.filter(|_| !self.is_due()) {
            Some(mask) => {
                self.masked(drafted, &mask);
                self.run += self.length.map_or(0, |_| accepted.len() + 1);
            }
            None => self.refresh(drafted),
        }
        self.judged(drafted.len(), accepted, next);
    }

    /// Steps without a draft, one for each token; the first of them sees what masked rounds have added.
    fn alone(&mut self, tokens: &[u32]) {
        for &token in tokens {
            self.count.solo += u64::from(self.run == 0);
            self.refresh(&[]);
            self.tokens.push(token);
        }
    }

    fn judged(&mut self, gamma: usize, accepted: &[u32], next: u32) {
        self.count.proposed += gamma as u64;
        self.count.accepted += accepted.len() as u64;
        self.tokens.extend(accepted);
        self.tokens.push(next);
        // Rows behind the first rejected token decide nothing.
        let known = self.tokens.len();
        self.masked_rows.retain(|row| row.0 < known);
    }

    /// A dense pass over the run and a round.
    fn refresh(&mut self, drafted: &[u32]) {
        self.dense(self.tokens.len() - self.run - 1, drafted);
        self.run = 0;
    }

    /// A dense forward over the tokens from index `first` on and a round.
    fn dense(&mut self, first: usize, drafted: &[u32]) {
        self.sequence.truncate(first);
        let input = [&self.tokens[first..], drafted].concat();
        self.count_reads(None, input.len());
        self.step(&input, None, LogitRows::Verify);
    }

    /// A masked round.
    fn masked(&mut self, drafted: &[u32], mask: &RoundMask) {
        let n = self.tokens.len();
        self.sequence.truncate(n - 1);
        let input = [&self.tokens[n - 1..], drafted].concat();
        let sources = self.map.of_head.iter().flatten();
        let mut lists = HeadLists::default();
        for (head, (&source, memory)) in sources.zip(&self.memory).enumerate() {
            let mut selection = mask.sources[source as usize].clone();
            if let Some(rule) = &self.map.memory {
                let offset = *rule.p_offset.iter().flatten().nth(head).unwrap();
                memory.select(shifted_mass(self.policy.p, offset), &mut selection);
            }
            lists.lists.push(read_list(selection, &self.policy, n));
            lists.of_head.push(head as u32);
        }
        self.count_reads(Some(&lists), input.len());
        let logits = self.step(&input, Some(&lists), LogitRows::Verify);
        let rows = logits.chunks_exact(self.model.config().vocab_size);
        self.masked_rows.extend(
            rows.enumerate()
                .map(|(row, logits)| (n + row, logits.to_vec())),
        );
    }

    fn count_reads(&mut self, lists: Option<&HeadLists>, inputs: usize) {
        let all = self.sequence.len() + inputs;
        let heads = self.map.of_head.iter().flatten().count();
        self.count.forwards += 1;
        self.count.dense += (heads * all) as u64;
        self.count.read += match lists {
            None => (heads * all) as u64,
            Some(lists) => lists
                .lists
                .iter()
                .map(|list| (list.count() + inputs) as u64)
                .sum(),
        };
    }

    fn step(&mut self, tokens: &[u32], lists: Option<&HeadLists>, logits: LogitRows) -> Vec<f32> {
        let rule = self.map.memory.as_ref().filter(|_| self.remembers);
        let cached = self.sequence.len();
        let output = self
            .model
            .forward(&mut [Step {
                lists,
                logits,
                masses: rule.is_some(),
                ..Step::new(&mut self.sequence, tokens)
            }])
            .unwrap()
            .remove(0);
        if let (Some(rule), Some(masses)) = (rule, output.masses) {
            let all: PositionSet = (0..cached).collect();
            for (head, (memory, masses)) in self.memory.iter_mut().zip(&masses.of_head).enumerate()
            {
                let list = lists.map_or(&all, |lists| &lists.lists[head]);
                memory.observe(list, masses, rule.decay);
            }
        }
        output.logits.to_vec()
    }
}

/// KL(p ‖ q), nats, of the distributions of two rows of logits.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let log_probs = |row: &[f32]| -> Vec<f64> {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let shifted = row.iter().map(|&x| f64::from(x - top));
        let norm = shifted.clone().map(f64::exp).sum::<f64>().ln();
        shifted.map(|x| x - norm).collect()
    };
    let (p, q) = (log_probs(p), log_probs(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}
