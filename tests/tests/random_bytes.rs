//! Random and damaged bytes at every method of every service: each call ends with a status, every process lives, memory
//! stays bounded, and the next client is served as ever.
#![allow(clippy::unwrap_used)]

use prost::Message;
use specattn_proto::v1::{
    AttachRequest, CancelRequest, CloseRequest, DraftPolicy, Heartbeat, RegisterRequest,
    Registration, WorkerRole, register_request,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_tests::session::open_request;
use specattn_tests::stranger::{join, join_request, model_info};
use specattn_tests::texts::references;
use specattn_tests::{Cluster, Request, raw};
use tonic::Code;
use tonic::transport::Channel;

/// Calls per method and kind of damage.
const CALLS: usize = 40;

/// Most memory a process may come to hold: model, KV cache and some hundred megabytes of whatever it was sent.
const MEMORY: u64 = 1 << 30;

/// SplitMix64 (Steele et al. 2014): enough to damage things by, and the same every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = self.below(300);
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// A message with a few bytes changed, cut off, or grown by a field that claims 2^40 bytes.
    fn damaged(&mut self, message: &[u8]) -> Vec<u8> {
        let mut bytes = message.to_vec();
        match self.below(3) {
            0 => {
                for _ in 0..=self.below(4) {
                    let at = self.below(bytes.len());
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte = self.next() as u8;
                    }
                }
            }
            1 => bytes.truncate(self.below(bytes.len())),
            _ => bytes.extend([0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20]),
        }
        bytes
    }
}

/// Sends random and damaged messages to a method.
async fn pester(channel: &Channel, method: &str, valid: &[u8], random: &mut Random) {
    for call in 0..CALLS {
        let mut messages = vec![random.bytes()];
        if call % 2 == 1 {
            messages = vec![random.damaged(valid)];
        }
        if call % 5 == 4 {
            messages.push(random.bytes());
        }
        if call == 0 {
            messages.clear();
        }
        let (_, status) = raw::call(channel.clone(), method, messages).await;
        assert_ne!(status.code(), Code::Unknown, "{method}: {status}");
        assert!(!status.message().contains("panic"), "{method}: {status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_handler_withstands_any_bytes() {
    let mut cluster = Cluster::start(1).await;
    let random = &mut Random(1);
    // A session for the streams to be about; damaged copies of its opening may end it, which is its opener's right.
    let open = open_request(&references()[0].prompt, 5);
    let id = open.session_id.clone();
    let generate = Request::tokens(&references()[0].prompt, 5).0;
    let register = RegisterRequest {
        message: Some(register_request::Message::Registration(Registration {
            role: WorkerRole::Draft.into(),
            endpoint: "http://127.0.0.1:1".to_owned(),
            model: Some(model_info()),
            load: None,
            protocol_version: PROTOCOL_VERSION,
            build: String::new(),
        })),
    };
    let heartbeat = RegisterRequest {
        message: Some(register_request::Message::Heartbeat(Heartbeat {
            load: None,
        })),
    };
    let attach = AttachRequest {
        session_id: id.clone(),
        verify_endpoint: cluster.verify.uri().to_owned(),
        token_ids: open.token_ids.clone(),
        policy: Some(DraftPolicy {
            draft_length: Some(4),
            ..DraftPolicy::default()
        }),
        max_tokens_total: 60,
        capability: open.draft_capability.clone(),
        protocol_version: PROTOCOL_VERSION,
    };
    let close = CloseRequest {
        session_id: id.clone(),
        reason: 3,
    };
    let cancel = CancelRequest {
        session_id: id.clone(),
    };
    let verify = cluster.verify.channel().await;
    for (method, valid) in [
        ("VerifyService/Open", open.encode_to_vec()),
        (
            "VerifyService/Speculate",
            join_request(join(&id, 50)).encode_to_vec(),
        ),
        ("VerifyService/Close", close.encode_to_vec()),
        ("VerifyService/VerifyStatus", Vec::new()),
    ] {
        pester(&verify, method, &valid, random).await;
    }
    let draft = cluster.drafts[0].channel().await;
    for (method, valid) in [
        ("DraftService/Attach", attach.encode_to_vec()),
        ("DraftService/DraftStatus", Vec::new()),
    ] {
        pester(&draft, method, &valid, random).await;
    }
    let gateway = cluster.channel().await;
    for (method, valid) in [
        ("GenerationService/Generate", generate.encode_to_vec()),
        ("GenerationService/Cancel", cancel.encode_to_vec()),
        ("RegistryService/Register", register.encode_to_vec()),
        ("RegistryService/Register", heartbeat.encode_to_vec()),
        ("RegistryService/Status", Vec::new()),
    ] {
        pester(&gateway, method, &valid, random).await;
    }
    cluster.is_idle().await;
    let Cluster {
        gateway,
        verify,
        drafts,
    } = &mut cluster;
    for process in drafts.iter_mut().chain([gateway, verify]) {
        assert!(process.is_alive());
        assert!(process.peak_memory() < MEMORY, "{}", process.peak_memory());
    }
    let reference = &references()[1];
    let request = Request::tokens(&reference.prompt, 64).draft_length(4);
    let completion = request.run(cluster.channel().await).await.unwrap();
    assert_eq!(completion.tokens, reference.greedy);
}
