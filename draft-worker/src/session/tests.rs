//! The state machine alone: forwards are scripted, proposals are read at the channel's other end.

use specattn_engine::AttentionRows;
use specattn_engine::sampling::{SamplingParams, check_draft};
use specattn_mask::{MaskPolicy, Source};

use super::*;
use crate::args::{Drafting, LookaheadMode};
use crate::own_reads::OwnPolicy;

mod ahead;
mod exploring;
mod masks;

const VOCAB: usize = 16;
const HEADS: usize = 2;
const LAYERS: usize = 3;

/// The scripted draft: after token t at position p comes (t + p) mod 16.
fn next(token: u32, position: usize) -> u32 {
    (token + position as u32) % VOCAB as u32
}

/// What the scripted draft says after the text `tokens`, `count` times.
fn continuation(mut tokens: Vec<u32>, count: usize) -> Vec<u32> {
    let start = tokens.len();
    for _ in 0..count {
        let last = tokens.len() - 1;
        tokens.push(next(tokens[last], last));
    }
    tokens.split_off(start)
}

fn spec(limit: usize) -> SessionSpec {
    SessionSpec {
        tokens: vec![3, 1, 4],
        limit,
        capacity: limit + 4,
        draft_length: 4,
        drafting: Drafting {
            max_q_entries: 8,
            own: OwnPolicy {
                capture_every: 1,
                p: 0.9,
            },
            lookahead: LookaheadMode::Off,
        },
    }
}

fn welcome() -> Welcome {
    Welcome {
        epoch: 0,
        tokens: Vec::new(),
        prompt_tokens: 3,
        draft_length: 4,
        may_shorten: false,
        sampling: SamplingParams::default(),
        policy: MaskPolicy::default(),
        sources: Vec::new(),
    }
}

struct Bench {
    session: Session,
    proposals: mpsc::Receiver<Proposal>,
    cache: Vec<u32>,
    /// KV entries that each forward read, of those a dense one would.
    reads: Vec<KvReads>,
}

impl Bench {
    fn new(spec: SessionSpec) -> Self {
        let (sender, proposals) = mpsc::channel(crate::service::PROPOSALS);
        Self {
            session: Session::new(
                spec,
                DraftShape {
                    vocab_size: VOCAB,
                    num_layers: LAYERS,
                    num_heads: HEADS,
                    num_kv_heads: 1,
                },
                sender,
                Arc::default(),
            ),
            proposals,
            cache: Vec::new(),
            reads: Vec::new(),
        }
    }

    /// Runs forwards until the session idles; what each was fed.
    fn run(&mut self) -> Vec<Vec<u32>> {
        let mut fed = Vec::new();
        while self.session.plan() == Plan::Run {
            assert!(
                self.session.cached() <= self.cache.len(),
                "positions are appended in order"
            );
            self.cache.truncate(self.session.cached());
            let input = self.session.input().to_vec();
            self.cache.extend(&input);
            let (kv_len, layers) = (self.cache.len(), self.session.capture().to_vec());
            let mut output = StepOutput {
                kv: self.count(&input),
                ..StepOutput::default()
            };
            self.reads.push(output.kv);
            if self.session.logit_rows() == LogitRows::Last {
                output.logits = vec![0.0; VOCAB].into();
                output.logits[next(self.cache[kv_len - 1], kv_len - 1) as usize] = 2.0;
            }
            if !layers.is_empty() {
                // All of the mass on position 1 of every row.
                let rows = layers.len() * HEADS;
                let probs = (0..rows * kv_len).map(|i| f32::from(u8::from(i % kv_len == 1)));
                output.attention = Some(AttentionRows {
                    layers,
                    num_heads: HEADS,
                    kv_len,
                    probs: probs.collect(),
                });
            }
            self.session.settle(&output).unwrap();
            fed.push(input);
        }
        fed
    }

    /// What the planned forward over `input`, which is in the cache already, reads.
    fn count(&self, input: &[u32]) -> KvReads {
        let past = self.cache.len() - input.len();
        let dense = (LAYERS * self.cache.len()) as u64;
        let read = self.session.lists().map_or(dense, |lists| {
            assert_eq!(lists.of_head.len(), LAYERS);
            let lists = lists.of_head.iter().map(|&i| &lists.lists[i as usize]);
            let read = lists.map(|list| {
                assert!(list.len() <= past);
                (list.count() + input.len()) as u64
            });
            read.sum()
        });
        KvReads { read, dense }
    }

    /// The next whole proposal, put together from its messages.
    fn proposal(&mut self) -> Proposal {
        let mut whole = self.proposals.try_recv().unwrap();
        while !whole.last {
            let next = self.proposals.try_recv().unwrap();
            assert!(next.sequence > whole.sequence);
            let continues = next.offset == whole.draft.len();
            let draft = std::mem::take(&mut whole.draft);
            let (read, mask) = (whole.kv, whole.mask);
            whole = next;
            whole.kv += read;
            assert!(mask.is_none() || whole.mask.is_none());
            whole.mask = whole.mask.or(mask);
            if continues {
                whole.draft.splice(0..0, draft);
            }
        }
        whole
    }

    fn judge(&mut self, verdict: Verdict) {
        self.session.judge(verdict).unwrap();
        self.cache.truncate(self.session.cached());
        let text: Vec<u32> = self.session.text_from(0).collect();
        assert!(
            text.starts_with(&self.cache),
            "{:?} does not begin {text:?}",
            self.cache
        );
    }
}

fn tokens(proposal: &Proposal) -> Vec<u32> {
    proposal.draft.iter().map(|d| d.token).collect()
}

fn judged(base: usize, accepted: usize, next_token: u32, epoch: u64) -> Verdict {
    Verdict {
        epoch,
        base: base as u64,
        accepted,
        next_tokens: vec![next_token],
        judged: true,
        need_full_mask: false,
        mask_p: None,
    }
}

fn told(base: usize, tokens: &[u32], epoch: u64) -> Verdict {
    Verdict {
        epoch,
        base: base as u64,
        accepted: 0,
        next_tokens: tokens.to_vec(),
        judged: false,
        need_full_mask: false,
        mask_p: None,
    }
}

#[test]
fn it_catches_up_before_the_welcome_and_then_drafts() {
    let mut bench = Bench::new(spec(30));
    assert_eq!(bench.run(), [[3, 1]]);
    bench.session.join(welcome()).unwrap();
    // Position 2 holds 4; then 6 at 3, 9 at 4, 13 at 5 and 18 - 16 at 6: the last is proposed, never fed.
    assert_eq!(bench.run(), [[4], [6], [9], [13]]);
    let proposal = bench.proposal();
    assert_eq!(tokens(&proposal), [6, 9, 13, 2]);
    assert_eq!(
        (proposal.base, proposal.pending_token, proposal.sequence),
        (3, 4, 2)
    );
    assert!(proposal.draft.iter().all(|d| d.q.is_none()));
}

#[test]
fn verdicts_roll_back_what_was_wrong_and_no_more() {
    let mut bench = Bench::new(spec(30));
    bench.session.join(welcome()).unwrap();
    bench.run();
    bench.proposal();
    // All accepted: the last draft token was never fed, so two tokens are missing.
    bench.judge(judged(3, 4, 11, 0));
    assert_eq!(bench.session.tokens, [3, 1, 4, 6, 9, 13, 2, 11]);
    assert_eq!(bench.run()[0], [2, 11]);
    let proposal = bench.proposal();
    assert_eq!((proposal.base, proposal.epoch), (8, 0));
    // One accepted: the others are forgotten.
    bench.judge(judged(8, 1, 0, 1));
    assert_eq!(bench.session.cached(), 9);
    assert_eq!(bench.run()[0], [0]);
    let proposal = bench.proposal();
    assert_eq!(
        (proposal.base, proposal.epoch, proposal.sequence),
        (10, 1, 4)
    );
}

#[test]
fn a_round_is_announced_while_the_verify_worker_goes_on_alone() {
    let mut bench = Bench::new(spec(30));
    bench.session.join(welcome()).unwrap();
    bench.run();
    let parts = |bench: &mut Bench| -> Vec<(usize, Vec<u32>, bool)> {
        std::iter::from_fn(|| bench.proposals.try_recv().ok())
            .map(|p| (p.offset, tokens(&p), p.last))
            .collect()
    };
    assert_eq!(
        parts(&mut bench),
        [(0, vec![6], false), (1, vec![9, 13, 2], true)]
    );
    // A judged round is waited for: the next one is a single message.
    bench.judge(judged(3, 4, 11, 0));
    bench.run();
    assert_eq!(parts(&mut bench).len(), 1);
    bench.judge(told(8, &[5], 1));
    bench.run();
    assert_eq!(parts(&mut bench).len(), 2);
}

#[test]
fn progress_made_without_it_ends_the_round() {
    let mut bench = Bench::new(spec(30));
    bench.session.join(welcome()).unwrap();
    bench.run();
    bench.proposal();
    // The verify worker went on alone and came to the first draft token itself: its KV entry stays.
    bench.judge(told(3, &[6], 1));
    assert_eq!(bench.session.cached(), 3);
    assert_eq!(bench.run()[0], [6]);
    let proposal = bench.proposal();
    assert_eq!((proposal.base, proposal.epoch), (4, 1));
    // The stale answer to the first proposal changes nothing: the second still waits.
    bench.judge(told(4, &[], 1));
    assert_eq!(bench.session.plan(), Plan::Wait(None));
    // News may overlap what is known.
    bench.judge(told(2, &[4, 6, 9, 13], 2));
    assert_eq!(bench.session.tokens, [3, 1, 4, 6, 9, 13]);
    assert_eq!(bench.session.cached(), 5);
}

#[test]
fn long_catch_ups_are_split() {
    let mut bench = Bench::new(SessionSpec {
        tokens: vec![1; 600],
        ..spec(2_000)
    });
    bench
        .session
        .join(Welcome {
            tokens: vec![2; 3],
            prompt_tokens: 600,
            ..welcome()
        })
        .unwrap();
    let fed: Vec<usize> = bench.run().iter().map(Vec::len).collect();
    assert_eq!(fed[..3], [256, 256, 87]);
    // What the gateway did not know is not shared: the first draft step feeds it.
    assert_eq!(fed[3..], [4, 1, 1, 1]);
    bench.judge(told(603, &[5; 20], 1));
    // A short gap is fed with the first draft step.
    let fed: Vec<usize> = bench.run().iter().map(Vec::len).collect();
    assert_eq!(fed, [20, 1, 1, 1]);
}

#[test]
fn nothing_is_proposed_beyond_the_end() {
    let mut bench = Bench::new(spec(6));
    bench.session.join(welcome()).unwrap();
    bench.run();
    // Three tokens are left: a round of two drafts and the bonus.
    assert_eq!(tokens(&bench.proposal()).len(), 2);
    bench.judge(judged(3, 1, 0, 1));
    assert_eq!(bench.session.round_length(), 0);
    bench.run();
    assert!(bench.proposals.try_recv().is_err());
    // Within a context shorter than the session it drafts to the last position and then gives up.
    let mut short = Bench::new(SessionSpec {
        capacity: 5,
        ..spec(30)
    });
    short.session.join(welcome()).unwrap();
    short.run();
    assert_eq!(tokens(&short.proposal()).len(), 3);
    short.judge(judged(3, 1, 0, 1));
    short.run();
    assert_eq!(tokens(&short.proposal()).len(), 1);
    let outgrown = short.session.judge(judged(5, 1, 0, 1)).unwrap_err();
    assert_eq!(outgrown.label(), "resource_exhausted");
}

#[test]
fn verdicts_that_make_no_sense_are_faults() {
    let bad = [
        judged(4, 0, 0, 0),
        judged(3, 5, 0, 0),
        judged(3, 0, VOCAB as u32, 0),
        told(4, &[1], 1),
        told(usize::MAX, &[1], 1),
    ];
    for verdict in bad {
        let mut bench = Bench::new(spec(30));
        bench.session.join(welcome()).unwrap();
        bench.run();
        assert_eq!(
            bench.session.judge(verdict).unwrap_err().label(),
            "failed_precondition"
        );
    }
    let mut early = Bench::new(spec(30));
    assert!(early.session.judge(told(3, &[1], 1)).is_err());
    early.session.join(welcome()).unwrap();
    assert!(early.session.judge(judged(3, 1, 1, 0)).is_err());
    assert!(early.session.join(welcome()).is_err());
    let prompt_tokens = |prompt_tokens| Welcome {
        prompt_tokens,
        ..welcome()
    };
    assert!(Bench::new(spec(30)).session.join(prompt_tokens(0)).is_err());
    assert!(Bench::new(spec(30)).session.join(prompt_tokens(4)).is_err());
}

#[test]
fn sampled_tokens_pass_the_targets_replay() {
    let rng = CounterRng::new(99);
    let mut bench = Bench::new(spec(60));
    bench
        .session
        .join(Welcome {
            sampling: SamplingParams {
                temperature: 0.9,
                seed: rng.draft_seed(),
                ..SamplingParams::default()
            },
            ..welcome()
        })
        .unwrap();
    for _ in 0..8 {
        bench.run();
        let proposal = bench.proposal();
        let rng = rng.behind(bench.session.tokens.iter().copied());
        check_draft(&proposal.draft, false, VOCAB, &rng, proposal.base as u64).unwrap();
        let entries = proposal
            .draft
            .iter()
            .map(|d| d.q.as_ref().unwrap().ids.len());
        assert!(entries.into_iter().all(|n| n <= 8));
        bench.judge(judged(proposal.base, 2, 7, 0));
    }
}

#[test]
fn withdrawn_tokens_are_replaced_and_forgotten() {
    let mut bench = Bench::new(spec(40));
    bench.session.join(welcome()).unwrap();
    bench.run();
    bench.proposal();
    bench.judge(judged(3, 4, 11, 0));
    bench.run();
    assert_eq!(bench.proposal().base, 8);
    // What stands at 5 and later was provisional: another token comes in its place.
    bench.judge(told(5, &[9, 1], 1));
    assert_eq!(bench.session.tokens, [3, 1, 4, 6, 9, 9, 1]);
    assert_eq!(bench.session.cached(), 5);
    assert_eq!(bench.run()[0], [9, 1]);
    let proposal = bench.proposal();
    assert_eq!(
        (proposal.base, proposal.epoch, proposal.pending_token),
        (7, 1, 1)
    );
    // A verdict may repeat what stands before the first difference.
    bench.judge(told(4, &[9, 9, 2], 2));
    assert_eq!(bench.session.tokens, [3, 1, 4, 6, 9, 9, 2]);
    bench.run();
    assert_eq!(bench.proposal().pending_token, 2);
    // The prompt cannot be withdrawn.
    assert!(bench.session.judge(told(2, &[1], 3)).is_err());
    assert!(bench.session.judge(told(8, &[1], 3)).is_err());
}
