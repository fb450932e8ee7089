//! Sampled dense and exact output has the target's distribution: a chi-square test over whole sessions, with real models.
//!
//! Target and draft are tiny random checkpoints of one vocabulary, and a third stands for the target as masked passes see
//! it: no mask could make them differ more. Every session draws some tokens under its own seed, through proposals,
//! verdicts, rejections, bonus tokens, confirmations and withdrawals; how often each triple of first tokens came is
//! compared with its probability, computed from the target's logits alone.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView};
use specattn_engine::sampling::{History, draft_token};
use specattn_engine::{LoadOptions, Model, Step, StepOutput};
use specattn_mask::{Encoder, LayerMap, PositionSet, RoundMask};
use tokio::sync::{Semaphore, mpsc};

use super::*;
use crate::draft_link::{LinkId, NewLink, ProposalPart};
use crate::draft_reads::DraftReads;
use crate::events;

const VOCAB: usize = 10;
const PROMPT: [u32; 3] = [1, 2, 3];
const DRAWN: usize = 3;
const SESSIONS: u64 = 120_000;
/// Less than the vocabulary, so that q is truncated.
const Q_ENTRIES: usize = 7;

/// Writes a checkpoint of two layers with random weights.
fn write_checkpoint(folder: &Path, seed: u64) {
    let (hidden, mlp, heads, head_dim) = (32, 48, 2, 16);
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {VOCAB}, "hidden_size": {hidden}, "intermediate_size": {mlp},
            "num_hidden_layers": 2, "num_attention_heads": {heads}, "num_key_value_heads": 1, "head_dim": {head_dim},
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": false}}"#
    );
    std::fs::write(folder.join("config.json"), config).unwrap();
    let square = [hidden, hidden];
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, hidden]),
        ("lm_head.weight".to_owned(), vec![VOCAB, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    for layer in 0..2 {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((
                format!("model.layers.{layer}.{name}.weight"),
                shape.to_vec(),
            ));
        };
        add("input_layernorm", &[hidden]);
        add("self_attn.q_proj", &square);
        add("self_attn.k_proj", &[head_dim, hidden]);
        add("self_attn.v_proj", &[head_dim, hidden]);
        add("self_attn.o_proj", &square);
        add("post_attention_layernorm", &[hidden]);
        add("mlp.gate_proj", &[mlp, hidden]);
        add("mlp.up_proj", &[mlp, hidden]);
        add("mlp.down_proj", &[hidden, mlp]);
    }
    let rng = CounterRng::new(seed);
    let mut position = 0;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).flat_map(|_| {
                position += 1;
                let u = rng.uniform(position, specattn_engine::sampling::Purpose::Next) as f32;
                let value = if shape.len() == 1 {
                    1.0
                } else {
                    (u - 0.5) * 0.6
                };
                value.to_le_bytes()
            });
            let bytes = values.collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    let path = folder.join("model.safetensors");
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

/// A model whose logits are asked for by context, and remembered.
struct Oracle {
    model: Model,
    known: HashMap<Vec<u32>, Vec<f32>>,
}

impl Oracle {
    fn new(seed: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_checkpoint(folder.path(), seed);
        let options = LoadOptions {
            kv_cache_bytes: 1 << 20,
            threads: 1,
            ..LoadOptions::default()
        };
        let model = Model::load(folder.path(), &options, &mut |_, _| {}).unwrap();
        Self {
            model,
            known: HashMap::new(),
        }
    }

    /// The logits after `context`.
    fn logits(&mut self, context: &[u32]) -> Vec<f32> {
        if let Some(logits) = self.known.get(context) {
            return logits.clone();
        }
        let mut sequence = self.model.new_sequence(32).unwrap();
        let step = Step {
            logits: LogitRows::Last,
            ..Step::new(&mut sequence, context)
        };
        let output = self.model.forward(&mut [step]).unwrap().remove(0);
        let logits = output.logits.to_vec();
        self.known.insert(context.to_vec(), logits.clone());
        logits
    }
}

/// The models of a session.
struct Models {
    target: Oracle,
    /// The target in masked passes.
    masked: Oracle,
    draft: Oracle,
}

/// What a session is asked.
#[derive(Clone)]
struct Ask {
    mode: Mode,
    confirm_length: Option<u32>,
    /// Tokens drawn, at least three.
    tokens: usize,
    params: SamplingParams,
}

/// What a draft worker would send.
fn propose(
    session: &Session,
    sampler: &mut Sampler,
    rng: &CounterRng,
    draft: &mut Oracle,
) -> ProposalPart {
    let n = session.tokens.len();
    let mut text = session.tokens.clone();
    let mut q = Vec::new();
    for _ in 0..2 {
        let history = History {
            prompt: &PROMPT,
            output: &session.tokens[PROMPT.len()..],
            pending: &text[n..],
        };
        let distribution = sampler.distribution(&draft.logits(&text), history).unwrap();
        let before = text[..n].iter().copied();
        let rng = rng.attempt(session.epoch).behind(before);
        let (token, entries) = draft_token(&distribution, Q_ENTRIES, &rng, text.len() as u64);
        text.push(token);
        q.push(entries);
    }
    // Each message brings a mask of its own, complete in itself.
    let mask = RoundMask {
        context_len: n - 1,
        granularity: 1,
        sources: vec![PositionSet::from_positions(n - 1, [0])],
    };
    let mask = match session.spec.mode {
        Mode::Dense => Vec::new(),
        Mode::Sparse | Mode::Exact => Encoder::new().encode(&mask),
    };
    ProposalPart {
        epoch: session.epoch,
        base: n as u64,
        sequence: 0,
        pending_token: text[n - 1],
        offset: 0,
        tokens: text[n..].to_vec(),
        q,
        mask,
        last: true,
        pacing: Pacing::InOrder,
        assumed: Vec::new(),
        reads: DraftReads::default(),
    }
}

/// Runs one session; the first tokens it drew, and whether any were withdrawn on the way.
fn draw(ask: &Ask, seed: u64, models: &mut Models) -> ([u32; DRAWN], bool) {
    let spec = SessionSpec {
        id: SessionId::from_bits(1),
        tokens: PROMPT.to_vec(),
        prompt_tokens: PROMPT.len(),
        limit: PROMPT.len() + ask.tokens,
        sampling: SamplingParams {
            seed,
            ..ask.params.clone()
        },
        stop_tokens: Vec::new(),
        policy: MaskPolicy::default(),
        mask_p: None,
        mode: ask.mode,
        check: CheckedCheckPolicy {
            confirm_length: ask.confirm_length,
            ..CheckedCheckPolicy::default()
        },
        provisional: false,
        draft_length: 2,
        draft_while_it_pays: false,
        capability: None,
    };
    let (outbox, _events) = events::channel(PROMPT.len(), Duration::ZERO, || {});
    let mut session = Session::new(spec, VOCAB, outbox, &Shared::default()).unwrap();
    let (sender, mut verdicts) = mpsc::channel(32);
    let new = NewLink {
        id: LinkId(1),
        sender,
        slots: Arc::new(Semaphore::new(1)),
        timeout: Duration::from_secs(1),
    };
    let map = Arc::new(LayerMap::proportional(1, 1, 1, 1));
    session.join(new, PROMPT.len() as u64, map).unwrap();
    let Ok(LinkEvent::Welcome(welcome)) = verdicts.try_recv() else {
        panic!("no welcome");
    };
    let rng = CounterRng::for_draft(welcome.sampling.seed);
    let mut sampler = Sampler::new(welcome.sampling, VOCAB).unwrap();
    let now = Instant::now();
    let mut sequence = 0;
    loop {
        if session.cached() + 1 == session.tokens.len() {
            sequence += 1;
            let part = propose(&session, &mut sampler, &rng, &mut models.draft);
            session.receive(LinkId(1), ProposalPart { sequence, ..part });
        }
        assert_eq!(session.plan(now), Plan::Run);
        let past = session.cached();
        let text = [&session.tokens[..past], session.input()].concat();
        let oracle = match session.lists() {
            Some(_) => &mut models.masked,
            None => &mut models.target,
        };
        let mut output = StepOutput::default();
        if session.logit_rows() == LogitRows::Verify {
            let rows = (past + 1..=text.len()).map(|end| oracle.logits(&text[..end]));
            output.logits = rows.collect::<Vec<_>>().concat().into();
        }
        let ended = session.settle(&output).unwrap();
        assert!(session.link.is_some(), "no proposal was malformed");
        if ended.is_some() {
            let drawn = &session.tokens[PROMPT.len()..][..DRAWN];
            let stats = session.stats;
            let withdrawn = stats.confirmed_tokens < stats.provisional_tokens;
            return (drawn.try_into().unwrap(), withdrawn);
        }
    }
}

/// The probability of every triple, from the target alone.
fn expected(params: &SamplingParams, target: &mut Oracle) -> HashMap<[u32; DRAWN], f64> {
    let mut sampler = Sampler::new(params.clone(), VOCAB).unwrap();
    let mut all = HashMap::new();
    let mut grow = vec![(Vec::<u32>::new(), 1.0)];
    while let Some((output, probability)) = grow.pop() {
        if let Ok(triple) = <[u32; DRAWN]>::try_from(output.as_slice()) {
            all.insert(triple, probability);
            continue;
        }
        let context = [&PROMPT, output.as_slice()].concat();
        let history = History {
            prompt: &PROMPT,
            output: &output,
            pending: &[],
        };
        let distribution = sampler
            .distribution(&target.logits(&context), history)
            .unwrap();
        for token in 0..VOCAB as u32 {
            let p = f64::from(distribution.prob(token));
            if p > 0.0 {
                grow.push(([output.as_slice(), &[token]].concat(), probability * p));
            }
        }
    }
    all
}

/// Pearson's statistic over triples, and its distribution's 0.9999 quantile; triples expected fewer than eight times are
/// taken together.
fn statistic(ask: &Ask) -> (f64, f64) {
    let mut models = Models {
        target: Oracle::new(1),
        masked: Oracle::new(3),
        draft: Oracle::new(2),
    };
    let expected = expected(&ask.params, &mut models.target);
    let mut seen: HashMap<[u32; DRAWN], u64> = HashMap::new();
    let mut withdrawals = 0;
    for seed in 0..SESSIONS {
        let (triple, withdrawn) = draw(ask, seed, &mut models);
        *seen.entry(triple).or_default() += 1;
        withdrawals += u64::from(withdrawn);
    }
    if ask.mode == Mode::Exact {
        assert!(withdrawals > SESSIONS / 10, "the models hardly differ");
    }
    let mut impossible = 0.0;
    for triple in seen.keys() {
        impossible += f64::from(u8::from(!expected.contains_key(triple)));
    }
    let (mut statistic, mut cells) = (0.0, 0.0);
    let (mut rare_seen, mut rare_expected) = (0.0, 0.0);
    for (triple, probability) in &expected {
        let expected = probability * SESSIONS as f64;
        let seen = seen.get(triple).copied().unwrap_or(0) as f64;
        if expected < 8.0 {
            rare_seen += seen;
            rare_expected += expected;
            continue;
        }
        statistic += (seen - expected).powi(2) / expected;
        cells += 1.0;
    }
    if rare_expected > 0.0 {
        statistic += (rare_seen - rare_expected).powi(2) / rare_expected;
        cells += 1.0;
    }
    assert!(cells > 50.0, "{cells} cells tell little");
    // By Wilson and Hilferty (1931).
    let freedom: f64 = cells - 1.0;
    let limit =
        freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.719 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    println!("{statistic:.1} of {limit:.1} over {cells} cells, {withdrawals} withdrawals");
    (statistic + impossible * limit, limit)
}

fn check(mode: Mode, confirm_length: Option<u32>, tokens: usize, params: SamplingParams) {
    let ask = Ask {
        mode,
        confirm_length,
        tokens,
        params,
    };
    let (statistic, limit) = statistic(&ask);
    assert!(statistic < limit, "{statistic} of {limit}");
}

fn plain() -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        ..SamplingParams::default()
    }
}

fn everything() -> SamplingParams {
    SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        top_k: 8,
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logit_bias: vec![(4, 0.7)],
        ..SamplingParams::default()
    }
}

#[test]
fn plain_temperature_has_the_targets_distribution() {
    check(Mode::Dense, None, 3, plain());
}

#[test]
fn so_have_truncation_and_penalties() {
    check(Mode::Dense, None, 3, everything());
}

#[test]
fn exact_sessions_have_it_too() {
    check(Mode::Exact, Some(3), 5, plain());
}

#[test]
fn exact_sessions_that_end_within_a_run_have_it() {
    check(Mode::Exact, Some(8), 3, plain());
}

#[test]
fn exact_sessions_with_truncation_and_penalties_have_it() {
    check(Mode::Exact, Some(4), 6, everything());
}

#[test]
fn exact_sessions_that_choose_their_lengths_have_it() {
    check(Mode::Exact, None, 6, plain());
}

/// The test would see it if masked passes decided anything.
#[test]
fn sparse_sessions_have_not() {
    let ask = Ask {
        mode: Mode::Sparse,
        confirm_length: None,
        tokens: 3,
        params: plain(),
    };
    let (statistic, limit) = statistic(&ask);
    assert!(statistic > 20.0 * limit, "{statistic} of {limit}");
}
