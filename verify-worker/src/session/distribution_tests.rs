//! Sampled dense output has the target's distribution: a chi-square test over whole sessions, with real models.
//!
//! Target and draft are tiny random checkpoints of one vocabulary. Every session draws three tokens under its own seed,
//! through proposals, verdicts, rejections and bonus tokens; how often each triple came is compared with its
//! probability, computed from the target's logits alone.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use safetensors::tensor::{Dtype, TensorView};
use specattn_engine::sampling::draft_token;
use specattn_engine::{LoadOptions, Model, Step};
use tokio::sync::{Semaphore, mpsc};

use super::*;
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
                let u = rng.uniform(position, specattn_engine::sampling::Purpose::Bonus) as f32;
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
            sequence: &mut sequence,
            tokens: context,
            lists: None,
            logits: LogitRows::Last,
            capture: &[],
            masses: false,
        };
        let logits = self.model.forward(&mut [step]).unwrap().remove(0).logits;
        self.known.insert(context.to_vec(), logits.clone());
        logits
    }
}

/// Runs one session; the tokens it drew.
fn draw(params: &SamplingParams, target: &mut Oracle, draft: &mut Oracle) -> [u32; DRAWN] {
    let spec = SessionSpec {
        id: SessionId::from_bits(1),
        tokens: PROMPT.to_vec(),
        prompt_tokens: PROMPT.len(),
        limit: PROMPT.len() + DRAWN,
        sampling: params.clone(),
        stop_tokens: Vec::new(),
        policy: MaskPolicy::default(),
        sparse: false,
        draft_length: 2,
    };
    let (outbox, _events) = events::channel(PROMPT.len(), Duration::ZERO, || {});
    let mut session = Session::new(spec, VOCAB, outbox).unwrap();
    let (sender, mut verdicts) = mpsc::channel(8);
    let new = NewLink {
        id: LinkId(1),
        sender,
        slots: Arc::new(Semaphore::new(1)),
        timeout: std::time::Duration::from_secs(1),
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
        let n = session.tokens.len();
        if session.cached() + 1 == n {
            // What a draft worker would send.
            let mut text = session.tokens.clone();
            let mut q = Vec::new();
            for _ in 0..2 {
                let history = History {
                    prompt: &PROMPT,
                    output: &session.tokens[PROMPT.len()..],
                    pending: &text[n..],
                };
                let distribution = sampler.distribution(&draft.logits(&text), history).unwrap();
                let (token, entries) =
                    draft_token(&distribution, Q_ENTRIES, &rng, text.len() as u64);
                text.push(token);
                q.push(entries);
            }
            sequence += 1;
            session.receive(
                LinkId(1),
                ProposalPart {
                    epoch: session.epoch,
                    base: n as u64,
                    sequence,
                    pending_token: text[n - 1],
                    offset: 0,
                    tokens: text[n..].to_vec(),
                    q,
                    mask: Vec::new(),
                    last: true,
                    reads: DraftReads::default(),
                },
            );
        }
        assert_eq!(session.plan(now), Plan::Run);
        let past = session.cached();
        let text = [&session.tokens[..past], session.input()].concat();
        let mut output = StepOutput::default();
        if session.logit_rows() == LogitRows::All {
            for end in past + 1..=text.len() {
                output.logits.extend(target.logits(&text[..end]));
            }
        }
        let ended = session.settle(&output).unwrap();
        assert!(session.link.is_some(), "no proposal was malformed");
        if ended.is_some() {
            let drawn = &session.tokens[PROMPT.len()..];
            return drawn.try_into().unwrap();
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

/// Pearson's statistic over triples; those expected fewer than eight times are taken together.
fn check(params: &SamplingParams) {
    let (mut target, mut draft) = (Oracle::new(1), Oracle::new(2));
    let expected = expected(params, &mut target);
    let mut seen: HashMap<[u32; DRAWN], u64> = HashMap::new();
    for seed in 0..SESSIONS {
        let params = SamplingParams {
            seed,
            ..params.clone()
        };
        *seen
            .entry(draw(&params, &mut target, &mut draft))
            .or_default() += 1;
    }
    assert!(
        seen.keys().all(|triple| expected.contains_key(triple)),
        "an impossible triple"
    );
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
    // The chi-square distribution's 0.9999 quantile by Wilson and Hilferty (1931).
    let freedom: f64 = cells - 1.0;
    let limit =
        freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.719 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(cells > 50.0, "{cells} cells tell little");
    assert!(
        statistic < limit,
        "{statistic} of {limit} over {cells} cells"
    );
}

#[test]
fn plain_temperature_has_the_targets_distribution() {
    check(&SamplingParams {
        temperature: 0.9,
        ..SamplingParams::default()
    });
}

#[test]
fn so_have_truncation_and_penalties() {
    check(&SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        top_k: 8,
        repetition_penalty: 1.3,
        presence_penalty: 0.4,
        frequency_penalty: 0.3,
        logit_bias: vec![(4, 0.7)],
        ..SamplingParams::default()
    });
}
