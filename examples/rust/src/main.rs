//! A client in Rust: streams a completion over gRPC.
//!
//! `cargo run -p specattn-example -- "Once upon a time"`. Where the connection breaks, the session is resumed with the tokens that
//! came so far, so that every token comes exactly once.
#![forbid(unsafe_code)]

use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use specattn_proto::v1::generate_request::Prompt;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::{GenerateRequest, Limits, Mode, ResumeRequest, Sampling};
use tonic::{Code, Request};

/// Where the gateway is unless `SPECATTN_GATEWAY` says otherwise.
const GATEWAY: &str = "http://127.0.0.1:7400";

/// Pause before a broken stream is taken up again.
const PAUSE: Duration = Duration::from_millis(200);

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let prompt = match words.is_empty() {
        true => "It was a bright cold day in April".to_owned(),
        false => words.join(" "),
    };
    let gateway = std::env::var("SPECATTN_GATEWAY").unwrap_or_else(|_| GATEWAY.to_owned());
    let mut client = GenerationServiceClient::connect(gateway.clone())
        .await
        .with_context(|| format!("no gateway at {gateway}"))?;
    let request = GenerateRequest {
        prompt: Some(Prompt::Text(prompt)),
        // The target's own distribution, from masked passes that dense ones confirm.
        mode: Mode::Exact.into(),
        sampling: Some(Sampling {
            temperature: 0.8,
            seed: Some(7),
            ..Sampling::default()
        }),
        limits: Some(Limits {
            max_tokens: Some(64),
            ..Limits::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = client.generate(with_key(request)?).await?.into_inner();
    let mut session = String::new();
    let mut tokens = 0;
    loop {
        let response = match stream.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return Ok(()),
            Err(status) if status.code() == Code::Unavailable && !session.is_empty() => {
                tokio::time::sleep(PAUSE).await;
                let resume = ResumeRequest {
                    session_id: session.clone(),
                    from_index: tokens,
                };
                stream = client.resume(with_key(resume)?).await?.into_inner();
                continue;
            }
            Err(status) => return Err(status.into()),
        };
        match response.event {
            Some(Event::Started(started)) => session = started.session_id,
            Some(Event::Delta(delta)) => {
                tokens += delta.token_ids.len() as u64;
                print!("{}", delta.text);
                std::io::stdout().flush()?;
            }
            Some(Event::Finished(finished)) => {
                let stats = finished.stats.unwrap_or_default();
                let share = stats.kv_entries_read as f64 / stats.kv_entries_dense.max(1) as f64;
                eprintln!(
                    "\n{} tokens, {:.0} % of the KV entries read",
                    stats.completion_tokens,
                    100.0 * share
                );
            }
            // Looks ahead, for clients that ask for them.
            Some(Event::Provisional(_) | Event::Withdrawn(_)) | None => {}
        }
    }
}

/// A request that shows the API key of `SPECATTN_API_KEY`, where there is one.
fn with_key<T>(message: T) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(message);
    if let Ok(key) = std::env::var("SPECATTN_API_KEY") {
        let value = format!("Bearer {key}")
            .parse()
            .context("SPECATTN_API_KEY")?;
        request.metadata_mut().insert("authorization", value);
    }
    Ok(request)
}
