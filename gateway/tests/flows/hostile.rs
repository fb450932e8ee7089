//! Hostile requests: a clear status each, no panic, and the gateway lives on.

use crate::support::*;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use prost::Message;
use specattn_proto::limits;
use specattn_proto::v1::generate_request::Prompt;
use specattn_proto::v1::{
    CancelRequest, DraftPolicy, GenerateRequest, Limits, MaskPolicy, Mode, RegisterRequest,
    Registration, Sampling, TokenIds, WorkerRole, register_request,
};
use specattn_proto::version::PROTOCOL_VERSION;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request};

async fn world() -> (Client, Running, Running) {
    let gateway = start_gateway(quick_config()).await;
    let worker = FakeVerify::new(Script::default())
        .start(Some(&gateway.uri))
        .await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    (client, gateway, worker)
}

/// The gateway still serves.
async fn still_serves(client: &mut Client) {
    let got = read(client.generate(request(3)).await.unwrap()).await;
    assert_eq!(got.tokens.len(), 3);
}

fn with_sampling(sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        sampling: Some(sampling),
        ..request(3)
    }
}

fn with_prompt(prompt: Prompt) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(prompt),
        ..request(3)
    }
}

fn token_prompt(ids: Vec<u32>) -> GenerateRequest {
    with_prompt(Prompt::TokenIds(TokenIds { ids }))
}

#[tokio::test]
async fn bad_requests_are_invalid_arguments() {
    let (mut client, _gateway, _worker) = world().await;
    let bad = [
        (
            "no prompt",
            GenerateRequest {
                prompt: None,
                ..request(3)
            },
        ),
        ("empty text", with_prompt(Prompt::Text(String::new()))),
        ("empty tokens", token_prompt(Vec::new())),
        ("long tokens", token_prompt(vec![5; 1_024])),
        (
            "long text",
            with_prompt(Prompt::Text("word ".repeat(5_000))),
        ),
        (
            "endless text",
            with_prompt(Prompt::Text("x".repeat(limits::MAX_PROMPT_BYTES + 1))),
        ),
        ("foreign token", token_prompt(vec![5, 8_192])),
        ("huge token", token_prompt(vec![u32::MAX])),
        (
            "no mode",
            GenerateRequest {
                mode: Mode::Unspecified.into(),
                ..request(3)
            },
        ),
        (
            "odd mode",
            GenerateRequest {
                mode: 77,
                ..request(3)
            },
        ),
        (
            "NaN temperature",
            with_sampling(Sampling {
                temperature: f32::NAN,
                ..Default::default()
            }),
        ),
        (
            "NaN min_p",
            with_sampling(Sampling {
                min_p: f32::NAN,
                ..Default::default()
            }),
        ),
        (
            "NaN bias",
            with_sampling(Sampling {
                logit_bias: [(1, f32::NAN)].into(),
                ..Default::default()
            }),
        ),
        (
            "bias of nothing",
            with_sampling(Sampling {
                logit_bias: [(8_192, 1.0)].into(),
                ..Default::default()
            }),
        ),
        ("no tokens", request(0)),
        (
            "stop token",
            GenerateRequest {
                limits: Some(Limits {
                    stop_token_ids: vec![u32::MAX],
                    ..Default::default()
                }),
                ..request(3)
            },
        ),
        (
            "empty stop",
            GenerateRequest {
                stop: vec![String::new()],
                ..request(3)
            },
        ),
        (
            "many stops",
            GenerateRequest {
                stop: vec!["x".to_owned(); 17],
                ..request(3)
            },
        ),
        (
            "draft length",
            GenerateRequest {
                draft: Some(DraftPolicy {
                    draft_length: Some(u32::MAX),
                    ..DraftPolicy::default()
                }),
                ..request(3)
            },
        ),
        (
            "NaN mask",
            GenerateRequest {
                mask: Some(MaskPolicy {
                    mask_p: Some(f32::NAN),
                    ..Default::default()
                }),
                ..request(3)
            },
        ),
    ];
    for (what, request) in bad {
        let fault = client.refusal(request).await;
        assert_eq!(fault.label(), "invalid_argument", "{what}: {fault}");
    }
    for id in ["", "x", &"A".repeat(32)] {
        let request = CancelRequest {
            session_id: id.to_owned(),
        };
        let status = client.generation.cancel(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let unknown = CancelRequest {
        session_id: "0".repeat(32),
    };
    let status = client.generation.cancel(unknown).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    still_serves(&mut client).await;
}

#[tokio::test]
async fn absurd_but_legal_values_are_taken() {
    let (mut client, _gateway, _worker) = world().await;
    let mut request = request(u32::MAX);
    request.deadline_ms = Some(1 << 40);
    request.sampling = Some(Sampling {
        top_k: u32::MAX,
        ..Default::default()
    });
    let got = read(client.generate(request).await.unwrap()).await;
    assert_eq!(got.tokens.len(), 1_021);
}

#[tokio::test]
async fn messages_have_a_size_limit() {
    let (mut client, _gateway, _worker) = world().await;
    let most = limits::MAX_SESSION_MESSAGE_BYTES;
    for (bytes, code) in [
        (most - 64, Code::InvalidArgument),
        (most + 64, Code::OutOfRange),
    ] {
        let request = with_prompt(Prompt::Text("x".repeat(bytes)));
        let status = client.generate(request).await.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), code, "{bytes} bytes: {status}");
    }
    // A prompt of 128 K tokens is no matter of message size.
    let status = client.generate(token_prompt(vec![8_000; 131_072])).await;
    let status = status.map(|_| ()).unwrap_err();
    assert!(status.message().contains("131072 tokens"), "{status}");
}

#[tokio::test]
async fn registration_streams_are_checked() {
    let (mut client, _gateway, _worker) = world().await;
    let registration = |endpoint: &str, role: i32| RegisterRequest {
        message: Some(register_request::Message::Registration(Registration {
            role,
            endpoint: endpoint.to_owned(),
            model: Some(model()),
            load: None,
            protocol_version: PROTOCOL_VERSION,
            build: String::new(),
        })),
    };
    let draft = WorkerRole::Draft.into();
    let beat = RegisterRequest {
        message: Some(register_request::Message::Heartbeat(Default::default())),
    };
    for first in [
        RegisterRequest { message: None },
        beat,
        registration("", draft),
        registration(&"x".repeat(100_000), draft),
        registration("http://127.0.0.1:1", 0),
        registration("http://127.0.0.1:1", 99),
    ] {
        let answer = client.registry.register(tokio_stream::iter([first])).await;
        assert_eq!(
            answer.map(|_| ()).unwrap_err().code(),
            Code::InvalidArgument
        );
    }
    // So is a worker of another release, which is told so.
    for version in [0, PROTOCOL_VERSION + 1] {
        let mut other = registration("http://127.0.0.1:1", draft);
        if let Some(register_request::Message::Registration(it)) = &mut other.message {
            it.protocol_version = version;
        }
        let answer = client.registry.register(tokio_stream::iter([other])).await;
        let status = answer.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert!(status.message().contains("one release"), "{status}");
    }
    // Registering twice on one stream ends it.
    let twice = [
        registration("http://127.0.0.1:1", draft),
        registration("http://127.0.0.1:1", draft),
    ];
    let stream = client
        .registry
        .register(tokio_stream::iter(twice))
        .await
        .unwrap();
    drop(stream);
    client.wait_for_workers(1).await;
    // A silent stream is dropped after three intervals.
    let silent = tokio_stream::StreamExt::chain(
        tokio_stream::iter([registration("http://127.0.0.1:1", draft)]),
        tokio_stream::pending(),
    );
    let _stream = client.registry.register(silent).await.unwrap();
    client.wait_for_workers(2).await;
    client.wait_for_workers(1).await;
    still_serves(&mut client).await;
}

/// Sends raw bytes as the one message of a call and waits for the call's end.
async fn send_raw(channel: tonic::transport::Channel, path: &'static str, bytes: Vec<u8>) {
    let mut grpc = Grpc::new(channel);
    grpc.ready().await.unwrap();
    let call = grpc.server_streaming(
        Request::new(bytes),
        PathAndQuery::from_static(path),
        raw::Codec,
    );
    if let Ok(answer) = tokio::time::timeout(PATIENCE, call)
        .await
        .expect("an answer")
    {
        // Sessions that random bytes happened to open are dropped here.
        drop(answer);
    }
}

/// Messages as the bytes they are.
mod raw {
    use prost::bytes::{Buf, BufMut};
    use tonic::Status;
    use tonic::codec::{DecodeBuf, Decoder, EncodeBuf, Encoder};

    #[derive(Default)]
    pub(crate) struct Codec;

    impl tonic::codec::Codec for Codec {
        type Encode = Vec<u8>;
        type Decode = ();
        type Encoder = Codec;
        type Decoder = Codec;

        fn encoder(&mut self) -> Codec {
            Codec
        }

        fn decoder(&mut self) -> Codec {
            Codec
        }
    }

    impl Encoder for Codec {
        type Item = Vec<u8>;
        type Error = Status;

        fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
            buffer.put_slice(&item);
            Ok(())
        }
    }

    impl Decoder for Codec {
        type Item = ();
        type Error = Status;

        fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
            buffer.advance(buffer.remaining());
            Ok(Some(()))
        }
    }
}

/// A request that decodes, with values from everywhere.
fn arbitrary_request() -> impl Strategy<Value = GenerateRequest> {
    let sampling = (
        any::<f32>(),
        any::<u32>(),
        any::<Option<f32>>(),
        any::<f32>(),
        any::<Option<u64>>(),
    )
        .prop_map(|(temperature, top_k, top_p, min_p, seed)| Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            ..Sampling::default()
        });
    let prompt = prop_oneof![
        Just(None),
        any::<String>().prop_map(|text| Some(Prompt::Text(text))),
        prop::collection::vec(any::<u32>(), 0..20)
            .prop_map(|ids| Some(Prompt::TokenIds(TokenIds { ids }))),
        prop::collection::vec(0..8_192_u32, 0..20)
            .prop_map(|ids| Some(Prompt::TokenIds(TokenIds { ids }))),
    ];
    (
        prompt,
        prop::option::of(sampling),
        any::<Option<u32>>(),
        -1..4_i32,
        prop::collection::vec(any::<String>(), 0..3),
        any::<Option<u64>>(),
    )
        .prop_map(
            |(prompt, sampling, max_tokens, mode, stop, deadline_ms)| GenerateRequest {
                prompt,
                sampling,
                limits: Some(Limits {
                    max_tokens,
                    ..Limits::default()
                }),
                mode,
                stop,
                deadline_ms,
                ..GenerateRequest::default()
            },
        )
}

#[tokio::test]
async fn random_bytes_and_random_values_harm_nothing() {
    let (mut client, gateway, _worker) = world().await;
    let channel = specattn_service::channel::connect(&gateway.uri)
        .await
        .unwrap();
    let mut runner = TestRunner::deterministic();
    let bytes = prop::collection::vec(any::<u8>(), 0..64);
    let request = arbitrary_request();
    for _ in 0..100 {
        let bytes = bytes.new_tree(&mut runner).unwrap().current();
        for path in [
            "/specattn.v1.GenerationService/Generate",
            "/specattn.v1.GenerationService/Cancel",
            "/specattn.v1.RegistryService/Register",
            "/specattn.v1.RegistryService/Status",
        ] {
            send_raw(channel.clone(), path, bytes.clone()).await;
        }
        let request = request.new_tree(&mut runner).unwrap().current();
        let mut torn = request.encode_to_vec();
        torn.truncate(torn.len() * 3 / 4);
        send_raw(
            channel.clone(),
            "/specattn.v1.GenerationService/Generate",
            torn,
        )
        .await;
        if let Ok(mut stream) = client.generate(request).await {
            next(&mut stream).await.unwrap();
        }
    }
    still_serves(&mut client).await;
}
