//! API keys: who is let in, what a key's limits come to over gRPC and HTTP, and whose a session is after its gateway died.

use std::path::Path;

use specattn_gateway::{AccessArgs, ApiKey, Config, KeyFile, KeyLimits, LogConfig};
use specattn_proto::Fault;
use specattn_proto::v1::ResumeRequest;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_service::Secrets;
use specattn_service::args::ServerArgs;
use specattn_service::channel::{Dialer, Link};
use specattn_service::security::SecurityArgs;

use crate::http::exchange;
use crate::support::*;

/// A gateway's configuration with the keys in a file.
fn keyed(keys: Vec<ApiKey>, dir: &Path) -> Config {
    let path = dir.join("keys.json");
    std::fs::write(&path, serde_json::to_vec(&KeyFile { keys }).unwrap()).unwrap();
    let access = AccessArgs {
        api_keys: Some(path),
        draft_secret_file: None,
    };
    let server = ServerArgs {
        listen: "127.0.0.1:0".parse().unwrap(),
        advertise: None,
        drain_timeout_ms: 300,
        security: SecurityArgs::default(),
    };
    let mut config = quick_config();
    (config.server, config.access) = access.config(&server).unwrap();
    config
}

fn key(name: &str, limits: KeyLimits) -> (ApiKey, String) {
    let (mut key, text) = ApiKey::generate(name).unwrap();
    key.limits = limits;
    (key, text)
}

async fn client(gateway: &Running, key: Option<&str>) -> GenerationServiceClient<Link> {
    let secrets = key.map(|key| Secrets::of(key).unwrap());
    let link = Dialer::new(None, secrets).connect(&gateway.uri).await;
    GenerationServiceClient::new(link.unwrap())
}

/// Sends a request; the fault that it is refused with, or its whole text.
async fn run(client: &mut GenerationServiceClient<Link>, tokens: u32) -> Result<String, Fault> {
    match client.generate(request(tokens)).await {
        Ok(stream) => Ok(read(stream.into_inner()).await.text),
        Err(status) => Err(Fault::from_status(&status)),
    }
}

fn hint(refused: Result<String, Fault>) -> std::time::Duration {
    match refused {
        Err(Fault::ResourceExhausted {
            retry_after: Some(after),
            ..
        }) => after,
        other => panic!("{other:?}"),
    }
}

async fn wait_for_worker(gateway: &Running, key: &str) {
    let mut client = client(gateway, Some(key)).await;
    let came = async {
        while let Err(Fault::Unavailable(_)) = run(&mut client, 1).await {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, came).await.unwrap();
}

#[tokio::test]
async fn limits_hold_over_grpc_and_http() {
    let dir = tempfile::tempdir().unwrap();
    let (free, free_text) = key("free", KeyLimits::default());
    let (rate, rate_text) = key(
        "rate",
        KeyLimits {
            requests_per_minute: Some(2),
            ..KeyLimits::default()
        },
    );
    let (one, one_text) = key(
        "one",
        KeyLimits {
            concurrent_requests: Some(1),
            ..KeyLimits::default()
        },
    );
    let (tokens, tokens_text) = key(
        "tokens",
        KeyLimits {
            tokens_per_minute: Some(10),
            ..KeyLimits::default()
        },
    );
    let config = keyed(vec![free, rate, one, tokens], dir.path());
    let gateway = start_gateway(config).await;
    let script = Script {
        pace: std::time::Duration::from_millis(5),
        ..Script::default()
    };
    let worker = FakeVerify::new(script).start(Some(&gateway.uri)).await;
    wait_for_worker(&gateway, &free_text).await;

    for wrong in [None, Some("sk-specattn-0123456789012345678901234567")] {
        let refused = run(&mut client(&gateway, wrong).await, 1).await;
        assert_eq!(refused.unwrap_err().label(), "unauthenticated");
    }
    let mut by_rate = client(&gateway, Some(&rate_text)).await;
    for _ in 0..2 {
        run(&mut by_rate, 1).await.unwrap();
    }
    let after = hint(run(&mut by_rate, 1).await);
    assert!(after.as_secs() <= 30 && after.as_secs() >= 25, "{after:?}");

    let mut one_at_a_time = client(&gateway, Some(&one_text)).await;
    let running = one_at_a_time.generate(request(200)).await.unwrap();
    hint(run(&mut one_at_a_time, 1).await);
    drop(running);
    let came_free = async {
        while run(&mut one_at_a_time, 1).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, came_free).await.unwrap();

    // Three tokens of prompt and twenty of completion, of ten a minute.
    let mut by_tokens = client(&gateway, Some(&tokens_text)).await;
    run(&mut by_tokens, 20).await.unwrap();
    let after = hint(run(&mut by_tokens, 1).await);
    assert!(after.as_secs() > 60, "{after:?}");

    let post = |key: &str| {
        let body = r#"{"prompt": "a", "max_tokens": 1}"#;
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Authorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let (status, _, body) = exchange(&gateway, post(&free_text).as_bytes()).await;
    assert_eq!(status, 200, "{body}");
    let (status, head, body) = exchange(&gateway, post(&tokens_text).as_bytes()).await;
    assert_eq!(status, 429, "{body}");
    assert!(head.contains("retry-after: "), "{head}");
    assert!(body.contains("rate_limit_error"), "{body}");
    let (status, _, body) = exchange(&gateway, post("nonsense").as_bytes()).await;
    assert_eq!(status, 401);
    assert!(body.contains("invalid_api_key"), "{body}");
    drop(worker);
}

#[tokio::test]
async fn logged_sessions_stay_their_keys() {
    let dir = tempfile::tempdir().unwrap();
    let (alice, alice_text) = key("alice", KeyLimits::default());
    let (bob, bob_text) = key("bob", KeyLimits::default());
    let start = || {
        let mut config = keyed(vec![alice.clone(), bob.clone()], dir.path());
        config.log = Some(LogConfig::new(dir.path().join("log")));
        start_gateway(config)
    };
    let gateway = start().await;
    let worker = FakeVerify::new(Script::default());
    let running = worker.start(Some(&gateway.uri)).await;
    wait_for_worker(&gateway, &alice_text).await;
    let stream = client(&gateway, Some(&alice_text))
        .await
        .generate(request(5))
        .await;
    let got = read(stream.unwrap().into_inner()).await;
    let session_id = got.started.unwrap().session_id;
    drop(running);
    gateway.kill().await;

    let gateway = start().await;
    let resume = |key: &str| {
        let request = ResumeRequest {
            session_id: session_id.clone(),
            from_index: 0,
        };
        let (gateway, key) = (&gateway, key.to_owned());
        async move { client(gateway, Some(&key)).await.resume(request).await }
    };
    let stolen = resume(&bob_text).await.map(drop).unwrap_err();
    assert_eq!(Fault::from_status(&stolen).label(), "not_found");
    let again = read(resume(&alice_text).await.unwrap().into_inner()).await;
    assert_eq!(again.text, got.text);
}
