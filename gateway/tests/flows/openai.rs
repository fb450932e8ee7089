//! The HTTP API over a raw socket: what is refused and how, and that a stream is well formed to the last byte.

use crate::http::exchange;
use crate::support::*;
use serde_json::{Value, json};

async fn post(gateway: &Running, path: &str, body: &str) -> (u16, String, String) {
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    exchange(gateway, request.as_bytes()).await
}

fn error_of(body: &str) -> Value {
    let value: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
    value["error"].clone()
}

/// A gateway with one verify worker that says `text`.
async fn world(text: &str) -> (Running, Running) {
    let gateway = start_gateway(quick_config()).await;
    let script = Script {
        tokens: ids(text),
        block: 1,
        ..Script::default()
    };
    let worker = FakeVerify::new(script).start(Some(&gateway.uri)).await;
    Client::new(&gateway).await.wait_for_workers(1).await;
    (gateway, worker)
}

#[tokio::test]
async fn a_completion_and_its_stream() {
    let text = " naïve 東京, and so on";
    let (gateway, _worker) = world(text).await;
    let mut request = json!({"model": "fake", "prompt": [5, 6, 7], "max_tokens": ids(text).len()});
    let (status, _, body) = post(&gateway, "/v1/completions", &request.to_string()).await;
    assert_eq!(status, 200, "{body}");
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["choices"][0]["text"], text);
    let usage = &answer["usage"];
    assert_eq!(usage["prompt_tokens"], 3);
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
    assert_eq!(answer["object"], "text_completion");

    request["stream"] = json!(true);
    let (status, head, body) = post(&gateway, "/v1/completions", &request.to_string()).await;
    assert_eq!(status, 200, "{body}");
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    let mut said = String::new();
    let mut done = false;
    for data in body.lines().filter_map(|line| line.strip_prefix("data: ")) {
        assert!(!done, "something follows the end: {data}");
        if data == "[DONE]" {
            done = true;
            continue;
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        said.push_str(chunk["choices"][0]["text"].as_str().unwrap());
    }
    assert!(done);
    assert_eq!(said, text);
}

#[tokio::test]
async fn failures_have_the_shape_that_clients_read() {
    let (gateway, _worker) = world(" so").await;
    let cases = [
        (
            "/v1/completions",
            json!({"prompt": "a", "model": "other"}),
            404,
            "model_not_found",
        ),
        (
            "/v1/completions",
            json!({"prompt": ""}),
            400,
            "invalid_argument",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "n": 0}),
            400,
            "invalid_argument",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "temperature": "hot"}),
            400,
            "invalid_argument",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "a"}]}),
            400,
            "invalid_argument",
        ),
        ("/v1/embeddings", json!({}), 404, "not_found"),
    ];
    for (path, body, expected, code) in cases {
        let (status, _, answer) = post(&gateway, path, &body.to_string()).await;
        assert_eq!(status, expected, "{path} {body}: {answer}");
        assert_eq!(error_of(&answer)["code"], code, "{path} {body}");
    }
    // Not HTTP at all, and a body that ends too soon: the server stays up.
    exchange(&gateway, b"\x16\x03\x01\x00\xff\xfe nonsense\r\n\r\n").await;
    exchange(
        &gateway,
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99\r\nConnection: close\r\n\r\n{",
    )
    .await;
    let (status, _, _) = exchange(
        &gateway,
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn without_a_worker_requests_are_turned_away() {
    let gateway = start_gateway(quick_config()).await;
    let (status, _, body) = post(
        &gateway,
        "/v1/completions",
        &json!({"prompt": "a"}).to_string(),
    )
    .await;
    assert_eq!(status, 503, "{body}");
    assert_eq!(error_of(&body)["type"], "server_error");
}
