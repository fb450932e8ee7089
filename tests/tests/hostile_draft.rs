//! Draft workers that lie: whatever comes over a Speculate stream, the session's tokens are the target's own, the
//! verify worker lives, and the liar is told what was wrong.
#![allow(clippy::unwrap_used)]

use specattn_proto::v1::{DraftDistribution, FinishReason, Join, ModelInfo, Propose};
use specattn_tests::process::VERIFY;
use specattn_tests::session::{capability, open_request};
use specattn_tests::stranger::{Stranger, join, model_info};
use specattn_tests::texts::references;
use specattn_tests::{Process, Session, soon};
use tonic::transport::Channel;
use tonic::{Code, Status};

const TOKENS: u32 = 1_000;

struct Bench {
    verify: Process,
    channel: Channel,
    prompt: Vec<u32>,
    expected: Vec<u32>,
}

impl Bench {
    async fn start() -> Self {
        let verify = Process::worker(VERIFY, &["--draft-timeout-ms", "50"]).await;
        let channel = verify.channel().await;
        let prompt = references()[2].prompt.clone();
        let mut alone = open_request(&prompt, TOKENS);
        alone.draft_length = 0;
        let mut alone = Session::open(channel.clone(), alone).await.unwrap();
        alone.finish().await.unwrap();
        Self {
            verify,
            channel,
            prompt,
            expected: alone.tokens,
        }
    }

    async fn open(&self) -> Session {
        let request = open_request(&self.prompt, TOKENS);
        Session::open(self.channel.clone(), request).await.unwrap()
    }

    async fn join(&self, session: &Session) -> Stranger {
        Stranger::join(self.channel.clone(), session.id(), &self.prompt)
            .await
            .unwrap()
    }

    /// The session comes to its end with the target's own tokens, and nothing stays.
    async fn unharmed(&mut self, mut session: Session) {
        let (reason, _) = session.finish().await.unwrap();
        assert_eq!(reason, FinishReason::Length);
        assert_eq!(session.tokens, self.expected);
        self.verify.is_idle().await;
        assert!(self.verify.is_alive());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn false_joins_are_refused() {
    let mut bench = Bench::start().await;
    let session = bench.open().await;
    let known = bench.prompt.len();
    let with = |change: fn(&mut ModelInfo)| {
        let mut join = join(session.id(), known);
        let mut model = model_info();
        change(&mut model);
        join.draft_model = Some(model);
        join
    };
    let mut newer = join(session.id(), known);
    newer.protocol_version += 1;
    let mut nobody = join(session.id(), known);
    nobody.draft_model = None;
    let cases = [
        (Code::NotFound, join(&"f".repeat(32), known)),
        (Code::InvalidArgument, join("not an id", known)),
        (Code::InvalidArgument, join("", known)),
        (Code::InvalidArgument, join(session.id(), usize::MAX)),
        (Code::InvalidArgument, nobody),
        (Code::FailedPrecondition, newer),
        (Code::FailedPrecondition, with(|m| m.vocab_size = 8_191)),
        (
            Code::FailedPrecondition,
            with(|m| m.tokenizer_hash = "other".to_owned()),
        ),
        (Code::InvalidArgument, with(|m| m.num_layers = u32::MAX)),
        (Code::InvalidArgument, with(|m| m.num_heads = u32::MAX)),
        (Code::InvalidArgument, with(|m| m.num_layers = 0)),
        (Code::InvalidArgument, with(|m| m.name = "x".repeat(5_000))),
    ];
    for (code, join) in cases {
        let known = vec![0; known];
        let refused = Stranger::join_with(bench.channel.clone(), join, &known).await;
        let status = refused.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    let mut older = open_request(&bench.prompt, TOKENS);
    older.protocol_version = 0;
    let refused = Session::open(bench.channel.clone(), older).await;
    assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
    bench.unharmed(session).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stolen_session_id_opens_nothing() {
    let mut bench = Bench::start().await;
    let session = bench.open().await;
    let mut draft = bench.join(&session).await;
    let known = bench.prompt.len();
    let showing = |capability: Vec<u8>| Join {
        capability,
        ..join(session.id(), known)
    };
    let mut almost = capability();
    almost[31] ^= 1;
    let thieves = [
        (Code::PermissionDenied, showing(Vec::new())),
        (Code::PermissionDenied, showing(almost)),
        (Code::InvalidArgument, showing(capability()[..31].to_vec())),
    ];
    for (code, join) in thieves {
        let refused = Stranger::join_with(bench.channel.clone(), join, &bench.prompt).await;
        let status = refused.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    // The draft that has the right to be there was not disturbed.
    draft.insist(&[5, 6], |propose| propose).await.unwrap();
    drop(draft);
    bench.unharmed(session).await;

    let mut closed = open_request(&bench.prompt, TOKENS);
    closed.draft_capability = Vec::new();
    let closed = Session::open(bench.channel.clone(), closed).await.unwrap();
    let join = Join {
        capability: Vec::new(),
        ..join(closed.id(), known)
    };
    let refused = Stranger::join_with(bench.channel.clone(), join, &bench.prompt).await;
    assert_eq!(
        refused.map(|_| ()).unwrap_err().code(),
        Code::PermissionDenied
    );
    bench.unharmed(closed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn stale_and_false_proposals_are_answered_and_change_nothing() {
    let mut bench = Bench::start().await;
    let mut session = bench.open().await;
    let mut stranger = bench.join(&session).await;
    type Spoil = fn(Propose) -> Propose;
    let spoilers: [Spoil; 6] = [
        |p| Propose {
            epoch: p.epoch + 1,
            ..p
        },
        |p| Propose {
            epoch: u64::MAX,
            ..p
        },
        |p| Propose {
            base: p.base + 1,
            ..p
        },
        |p| Propose { base: 0, ..p },
        |p| Propose {
            base: u64::MAX,
            ..p
        },
        |p| Propose {
            pending_token: u32::MAX,
            ..p
        },
    ];
    for round in 0..60 {
        let spoil = spoilers[round % spoilers.len()];
        let propose = spoil(stranger.proposal(&[1, 2, 3]));
        stranger.send(propose).await;
        let verdict = stranger
            .verdict()
            .await
            .unwrap()
            .expect("the session goes on");
        assert!(!verdict.judged && verdict.accepted == 0);
        // No more than one a step: many at a time would be a flood.
        session.at_least(session.tokens.len() + 1).await.unwrap();
    }
    // Wrong tokens under a right header are judged and rejected.
    for _ in 0..20 {
        let verdict = stranger
            .insist(&[5, 5, 5], |propose| propose)
            .await
            .unwrap();
        if verdict.is_none() {
            break;
        }
    }
    drop(stranger);
    bench.unharmed(session).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn malformed_proposals_end_the_link_only() {
    let mut bench = Bench::start().await;
    type Spoil = fn(Propose) -> Propose;
    let spoilers: [(&str, Spoil); 9] = [
        ("no tokens", |p| Propose {
            token_ids: vec![],
            ..p
        }),
        ("too many tokens", |p| Propose {
            token_ids: vec![1; 5],
            ..p
        }),
        ("far too many tokens", |p| Propose {
            token_ids: vec![1; 100_000],
            ..p
        }),
        ("unknown token", |p| Propose {
            token_ids: vec![8_192],
            ..p
        }),
        ("largest token", |p| Propose {
            token_ids: vec![u32::MAX],
            ..p
        }),
        ("offset", |p| Propose {
            offset: u32::MAX,
            ..p
        }),
        ("q in a greedy session", |p| Propose {
            q: vec![DraftDistribution {
                ids: vec![1],
                probs: vec![f32::NAN],
            }],
            ..p
        }),
        ("mask in a dense session", |p| Propose {
            mask: vec![7; 100],
            ..p
        }),
        ("mask too long", |p| Propose {
            mask: vec![7; 2 << 20],
            ..p
        }),
    ];
    for (name, spoil) in spoilers {
        let session = bench.open().await;
        let mut stranger = bench.join(&session).await;
        let status = stranger.insist(&[1], spoil).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
        drop(session);
    }
    // Longer than any message may be: refused before it is read.
    let session = bench.open().await;
    let mut stranger = bench.join(&session).await;
    let status: Status = stranger
        .insist(&[1], |p| Propose {
            mask: vec![7; 8 << 20],
            ..p
        })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    bench.unharmed(session).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn random_masks_end_the_link_only() {
    let mut bench = Bench::start().await;
    let mut bits = 0x9e37_79b9_7f4a_7c15_u64;
    for length in [1, 2, 10, 100, 1_000, 60_000] {
        let mut request = open_request(&bench.prompt, TOKENS);
        request.mode = specattn_proto::v1::Mode::Sparse.into();
        let mut session = Session::open(bench.channel.clone(), request).await.unwrap();
        let mut stranger = bench.join(&session).await;
        assert!(!stranger.welcome.sources.is_empty());
        let mut random = || {
            // Xorshift: any bytes will do.
            bits ^= bits << 13;
            bits ^= bits >> 7;
            bits ^= bits << 17;
            bits as u8
        };
        let mask: Vec<u8> = (0..length).map(|_| random()).collect();
        let ended = stranger
            .insist(&[1], |p| Propose {
                mask: mask.clone(),
                ..p
            })
            .await;
        match ended {
            Err(status) => assert_eq!(
                status.code(),
                Code::InvalidArgument,
                "{length} bytes: {status}"
            ),
            // Bytes that look like a delta: a full mask is asked for and the round is dense.
            Ok(verdict) => assert!(verdict.is_none_or(|v| v.need_full_mask), "{length} bytes"),
        }
        session.at_least(20).await.unwrap();
    }
    bench.verify.is_idle().await;
    assert!(bench.verify.is_alive());
    let session = bench.open().await;
    bench.unharmed(session).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn false_distributions_end_the_link_only() {
    let bench = Bench::start().await;
    let q = |ids: &[u32], probs: &[f32]| DraftDistribution {
        ids: ids.to_vec(),
        probs: probs.to_vec(),
    };
    let half = [0.5, 0.5];
    let cases = [
        ("none", vec![]),
        ("two for one token", vec![q(&[1], &[1.0]), q(&[1], &[1.0])]),
        ("empty", vec![q(&[], &[])]),
        ("NaN", vec![q(&[1, 2], &[f32::NAN, 0.5])]),
        ("infinity", vec![q(&[1, 2], &[f32::INFINITY, 0.5])]),
        ("negative", vec![q(&[1, 2], &[-0.5, 1.5])]),
        ("unordered", vec![q(&[2, 1], &half)]),
        ("twice the same", vec![q(&[1, 1], &half)]),
        ("out of range", vec![q(&[1, 8_192], &half)]),
        ("uneven", vec![q(&[1], &half)]),
        ("sum", vec![q(&[1, 2], &[0.5, 0.4])]),
        (
            "too long",
            vec![q(&(0..1_025).collect::<Vec<_>>(), &[1.0 / 1_025.0; 1_025])],
        ),
        // Well-formed, but the token is not what the session's random numbers draw from it.
        ("chosen token", vec![q(&[1, 2], &[1e-6, 1.0])]),
    ];
    for (name, q) in cases {
        let mut request = open_request(&bench.prompt, TOKENS);
        let sampling = request.sampling.as_mut().unwrap();
        (sampling.temperature, sampling.seed) = (0.8, Some(11));
        let mut session = Session::open(bench.channel.clone(), request).await.unwrap();
        let mut stranger = bench.join(&session).await;
        // The draft learns its own random numbers, not the target's.
        assert_ne!(stranger.welcome.sampling.as_ref().unwrap().seed, Some(11));
        let status = stranger
            .insist(&[1], |p| Propose { q: q.clone(), ..p })
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name}: {status}");
        session.at_least(50).await.unwrap();
    }
    bench.verify.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flood_that_reads_no_answers_is_cut_off() {
    let mut bench = Bench::start().await;
    let session = bench.open().await;
    let mut stranger = bench.join(&session).await;
    let flood = async {
        for _ in 0..200_000 {
            let propose = Propose {
                epoch: u64::MAX,
                token_ids: vec![1; 4],
                ..stranger.proposal(&[])
            };
            if !stranger.send(propose).await {
                break;
            }
        }
    };
    let end = bench.unharmed(session);
    let both = Box::pin(async { tokio::join!(flood, end) });
    soon("a session under a flood", both).await;
    assert!(
        bench.verify.peak_memory() < 1 << 30,
        "{}",
        bench.verify.peak_memory()
    );
}
