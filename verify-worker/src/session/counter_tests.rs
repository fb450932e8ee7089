//! The KV counters of every mode, with the bundled map and so with the target's own memory, against what attention itself
//! handed out: it names the mass of each entry that it read, so their number is a count that no counter had a part in.

use std::path::Path;
use std::sync::Arc;

use specattn_engine::{KvReads, LoadOptions, Model, Step, StepOutput};
use specattn_mask::{Encoder, LayerMap, PositionSet, RoundMask};
use tokio::sync::{Semaphore, mpsc};

use super::*;
use crate::draft_link::{LinkId, NewLink, ProposalPart};
use crate::draft_reads::DraftReads;
use crate::events;

const PROMPT: usize = 200;
const TOKENS: usize = 150;
const ROUND: usize = 3;
/// Of so many positions masks keep one.
const SPARSE: usize = 40;

/// Entries that a forward read, by the masses that it handed out, and what a dense one would have.
fn count(output: &StepOutput, heads: usize, tokens: usize, past: usize) -> KvReads {
    let masses = output
        .masses
        .as_ref()
        .expect("a map with memory wants masses");
    assert_eq!(masses.of_head.len(), heads);
    let listed: usize = masses.of_head.iter().map(Vec::len).sum();
    KvReads {
        read: (listed + heads * tokens) as u64,
        dense: (heads * (past + tokens)) as u64,
    }
}

/// What a draft might send: the target's own tokens on two rounds of three, else others, and masks of few positions.
fn propose(session: &Session, text: &[u32], turn: usize, map: &LayerMap) -> ProposalPart {
    let n = session.tokens.len();
    let tokens = (n..n + ROUND).map(|at| match text.get(at) {
        Some(&token) if turn % 3 < 2 => token,
        _ => (at * 31 % 1_000) as u32,
    });
    let set = |source: usize| {
        let kept = (0..n - 1).filter(|position| (position + source + turn).is_multiple_of(SPARSE));
        PositionSet::from_positions(n - 1, kept)
    };
    let mask = RoundMask {
        context_len: n - 1,
        granularity: 1,
        sources: (0..map.sources.len()).map(set).collect(),
    };
    ProposalPart {
        epoch: session.epoch,
        base: n as u64,
        sequence: turn as u64 + 1,
        pending_token: session.tokens[n - 1],
        offset: 0,
        tokens: tokens.collect(),
        q: Vec::new(),
        mask: if session.spec.mode == Mode::Dense {
            Vec::new()
        } else {
            Encoder::new().encode(&mask)
        },
        last: true,
        pacing: Pacing::InOrder,
        assumed: Vec::new(),
        reads: DraftReads::default(),
    }
}

/// Runs a session to its end; its text.
fn check(mode: Mode, model: &mut Model, map: &Arc<LayerMap>, text: &[u32]) -> Vec<u32> {
    let spec = SessionSpec {
        id: SessionId::from_bits(1),
        tokens: (0..PROMPT as u32).map(|i| i * 7 % 900 + 5).collect(),
        prompt_tokens: PROMPT,
        limit: PROMPT + TOKENS,
        sampling: SamplingParams::default(),
        stop_tokens: Vec::new(),
        policy: MaskPolicy::default(),
        mask_p: None,
        mode,
        check: CheckedCheckPolicy::default(),
        provisional: false,
        draft_length: ROUND,
        draft_while_it_pays: false,
        capability: None,
    };
    let (outbox, _events) = events::channel(PROMPT, Duration::ZERO, || {});
    let vocab = model.config().vocab_size;
    let mut session = Session::new(spec, vocab, outbox, &Shared::default()).unwrap();
    let (sender, _verdicts) = mpsc::channel(1_024);
    let new = NewLink {
        id: LinkId(1),
        sender,
        slots: Arc::new(Semaphore::new(1)),
        timeout: Duration::from_secs(1),
    };
    session.join(new, PROMPT as u64, Arc::clone(map)).unwrap();
    let heads = model.config().num_layers * model.config().num_kv_heads;
    let mut sequence = model
        .new_sequence(PROMPT + TOKENS + 2 * ROUND + 64)
        .unwrap();
    let (mut counted, mut checking) = (KvReads::default(), 0);
    let (mut masked, mut remembered) = (0, 0);
    let now = Instant::now();
    for turn in 0.. {
        if session.cached() + 1 == session.tokens.len() {
            let part = propose(&session, text, turn, map);
            session.receive(LinkId(1), part);
        }
        assert_eq!(session.plan(now), Plan::Run);
        let (past, input) = (session.cached(), session.input().to_vec());
        let is_prefill = session.logit_rows() == LogitRows::None;
        let checks = session.lists().is_none() && !session.run.is_empty();
        if let Some(lists) = session.lists() {
            masked += 1;
            // What the mask keeps, sinks and window, and whatever else was heavy.
            let window = past.saturating_sub(session.spec.policy.window_tokens as usize);
            let of_head = lists.of_head.iter().map(|&n| &lists.lists[n as usize]);
            let far = of_head.map(|l| l.iter().filter(|&p| p < window).count());
            remembered += usize::from(far.max() > Some(window / SPARSE + 8));
        }
        sequence.truncate(past);
        let step = Step {
            lists: session.lists(),
            logits: session.logit_rows(),
            argmax: false,
            masses: session.wants_masses(),
            ..Step::new(&mut sequence, &input)
        };
        let output = model.forward(&mut [step]).unwrap().remove(0);
        if !is_prefill {
            let reads = if mode == Mode::Dense {
                let dense = (heads * (past + input.len())) as u64;
                KvReads { read: dense, dense }
            } else {
                count(&output, heads, input.len(), past)
            };
            counted += reads;
            checking += if checks { reads.read } else { 0 };
        }
        let ended = session.settle(&output).unwrap();
        assert!(session.link.is_some(), "no proposal was malformed");
        if ended.is_some() {
            break;
        }
    }
    let stats = session.stats;
    assert_eq!(
        (stats.kv.read, stats.kv.dense),
        (counted.read, counted.dense),
        "{mode:?}"
    );
    assert_eq!(stats.kv_entries_checking, checking, "{mode:?}");
    if mode != Mode::Dense {
        assert!(
            masked > 5 && remembered > 0,
            "{masked} masked, {remembered} with memory"
        );
        assert!(counted.read < counted.dense);
    }
    if mode == Mode::Exact {
        assert!(
            stats.confirmed_tokens < stats.provisional_tokens,
            "nothing was withdrawn"
        );
    }
    session.tokens
}

#[test]
fn counters_are_the_entries_that_attention_read() {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/target");
    let options = LoadOptions {
        kv_cache_bytes: 16 << 20,
        threads: 1,
        ..LoadOptions::default()
    };
    let mut model = Model::load(&target, &options, &mut |_, _| {}).unwrap();
    let map = Arc::new(LayerMap::load(&target.join("alignment.json")).unwrap());
    assert!(map.memory.is_some());
    let text = check(Mode::Dense, &mut model, &map, &[]);
    check(Mode::Sparse, &mut model, &map, &text);
    let exact = check(Mode::Exact, &mut model, &map, &text);
    assert_eq!(exact, text);
}
