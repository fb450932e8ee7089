//! What a client sees: text and tokens, every way of ending, limits.

use std::time::{Duration, Instant};

use crate::support::*;
use specattn_proto::v1::generate_request::Prompt;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::{CancelRequest, FinishReason, Limits, Sampling};

struct World {
    client: Client,
    verify: FakeVerify,
    gateway: Running,
    worker: Running,
}

async fn world(script: Script) -> World {
    world_with(script, quick_config()).await
}

async fn world_with(script: Script, config: specattn_gateway::Config) -> World {
    let gateway = start_gateway(config).await;
    let verify = FakeVerify::new(script);
    let worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    World {
        client,
        verify,
        gateway,
        worker,
    }
}

/// A script that commits a text.
fn says(text: &str, block: usize) -> Script {
    Script {
        tokens: ids(text),
        block,
        ..Script::default()
    }
}

#[tokio::test]
async fn streams_tokens_and_text_to_the_end() {
    let text = " naïve 東京 🦀, “quoted”, and so on";
    let script = says(text, 1);
    let tokens = script.tokens.clone();
    let mut world = world(script).await;
    let mut request = request(tokens.len() as u32);
    request.prompt = Some(Prompt::Text("It was".to_owned()));
    request.sampling = Some(Sampling {
        seed: Some(42),
        logprobs: Some(2),
        ..Sampling::default()
    });
    let got = read(world.client.generate(request).await.unwrap()).await;
    assert_eq!(got.tokens, tokens);
    assert_eq!(got.text, text);
    assert_eq!(got.logprobs.len(), tokens.len());
    let started = got.started.unwrap();
    assert_eq!((started.seed, started.session_id.len()), (42, 32));
    let finished = got.finished.unwrap();
    assert_eq!(finished.reason(), FinishReason::Length);
    assert_eq!(
        finished.stats.unwrap().completion_tokens,
        tokens.len() as u64
    );
    assert!(finished.ttft_seconds > 0.0 && finished.ttft_seconds <= finished.elapsed_seconds);
    let opened = &world.verify.opened()[0];
    assert_eq!(opened.token_ids[0], 0, "the begin mark comes first");
    assert_eq!(opened.token_ids.len(), opened.prompt_tokens as usize);
    assert_eq!(opened.mask.unwrap().mask_p, Some(0.95));
    assert_eq!(opened.draft_length, 4);
}

#[tokio::test]
async fn an_absent_seed_is_drawn() {
    let mut world = world(Script::default()).await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let got = read(world.client.generate(request(2)).await.unwrap()).await;
        seeds.push(got.started.unwrap().seed);
    }
    assert_ne!(seeds[0], seeds[1]);
    assert_eq!(
        world.verify.opened()[1].sampling.as_ref().unwrap().seed,
        Some(seeds[1])
    );
}

#[tokio::test]
async fn stop_strings_cut_text_wherever_blocks_end() {
    for block in [1, 2, 5, 64] {
        let mut world = world(says(" one two </stop> three four five six seven", block)).await;
        let mut request = request(500);
        request.stop = vec!["never".to_owned(), "</stop>".to_owned()];
        let got = read(world.client.generate(request).await.unwrap()).await;
        assert_eq!(got.text, " one two ", "blocks of {block}");
        let finished = got.finished.unwrap();
        assert_eq!(finished.reason(), FinishReason::Stop);
        assert_eq!(finished.stop, "</stop>");
        assert_eq!(
            finished.stats.unwrap().completion_tokens,
            got.tokens.len() as u64
        );
        let through = tokenizer().decode(&got.tokens, true).unwrap();
        assert!(through.trim_end().ends_with("</stop>"), "{through:?}");
    }
}

#[tokio::test]
async fn text_held_for_a_stop_string_is_released_at_the_end() {
    let script = says(" one two <", 1);
    let count = script.tokens.len() as u32;
    let mut world = world(script).await;
    let mut request = request(count);
    request.stop = vec!["</stop>".to_owned()];
    let got = read(world.client.generate(request).await.unwrap()).await;
    assert_eq!(got.text, " one two <");
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Length);
}

#[tokio::test]
async fn stop_tokens_are_committed_and_not_shown() {
    let mut script = says(" one two", 1);
    let word = script.tokens[0];
    script.tokens.push(1);
    let mut world = world(script).await;
    let got = read(world.client.generate(request(50)).await.unwrap()).await;
    assert_eq!(got.text, " one two");
    assert_eq!(got.tokens.last(), Some(&1));
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Stop);

    let mut request = request(50);
    request.limits = Some(Limits {
        max_tokens: Some(50),
        stop_token_ids: vec![word],
        ignore_eos: true,
    });
    let got = read(world.client.generate(request).await.unwrap()).await;
    assert_eq!(
        (got.text.as_str(), got.tokens.as_slice()),
        ("", &[word][..])
    );
}

#[tokio::test]
async fn cancel_ends_the_session_with_its_statistics() {
    let mut world = world(Script::default()).await;
    let mut stream = world.client.generate(request(1_000)).await.unwrap();
    let Ok(Some(Event::Started(started))) = next(&mut stream).await else {
        panic!("the stream begins with Started");
    };
    next(&mut stream).await.unwrap();
    let session_id = started.session_id;
    let status = world.client.status().await;
    assert_eq!(status.sessions[0].session_id, session_id);
    assert_eq!(status.workers[0].sessions_assigned, 1);
    let cancel = CancelRequest { session_id };
    world
        .client
        .generation
        .cancel(cancel.clone())
        .await
        .unwrap();
    let finished = loop {
        match next(&mut stream).await.unwrap() {
            Some(Event::Finished(finished)) => break finished,
            Some(_) => {}
            None => panic!("no Finished"),
        }
    };
    assert_eq!(finished.reason(), FinishReason::Cancelled);
    assert!(finished.stats.unwrap().target_forwards > 0);
    let again = world.client.generation.cancel(cancel).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::NotFound);
    let status = world.client.status().await;
    assert_eq!(
        (status.sessions.len(), status.workers[0].sessions_assigned),
        (0, 0)
    );
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_session() {
    let mut world = world(Script::default()).await;
    let mut stream = world.client.generate(request(1_000)).await.unwrap();
    next(&mut stream).await.unwrap();
    assert_eq!(world.verify.running(), 1);
    drop(stream);
    world
        .client
        .wait_for("the session's end", |status| status.sessions.is_empty())
        .await;
    let waiting = async {
        while world.verify.running() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap();
}

#[tokio::test]
async fn deadlines_end_sessions() {
    let mut world = world(Script::default()).await;
    let mut slow = request(1_000);
    slow.deadline_ms = Some(150);
    let began = Instant::now();
    let got = read(world.client.generate(slow).await.unwrap()).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Deadline);
    assert!(!got.tokens.is_empty());
    assert!(began.elapsed() < Duration::from_secs(5));
    // Absurd ones are as good as none.
    let mut long = request(2);
    long.deadline_ms = Some(u64::MAX);
    let got = read(world.client.generate(long).await.unwrap()).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Length);
}

#[tokio::test]
async fn a_worker_deaf_to_close_is_given_up() {
    let mut world = world(Script {
        deaf: true,
        pace: Duration::from_millis(20),
        ..Script::default()
    })
    .await;
    let mut request = request(1_000);
    request.deadline_ms = Some(50);
    let got = read(world.client.generate(request).await.unwrap()).await;
    let finished = got.finished.unwrap();
    assert_eq!(finished.reason(), FinishReason::Deadline);
    assert_eq!(
        finished.stats.unwrap().completion_tokens,
        got.tokens.len() as u64
    );
    assert_eq!(world.client.status().await.sessions.len(), 0);
}

#[tokio::test]
async fn sessions_are_bounded() {
    let mut config = quick_config();
    config.admission.sessions = 1;
    config.admission.queued = 0;
    let mut world = world_with(Script::default(), config).await;
    let stream = world.client.generate(request(1_000)).await.unwrap();
    let fault = world.client.refusal(request(2)).await;
    assert_eq!(fault.label(), "resource_exhausted");
    drop(stream);
    world
        .client
        .wait_for("a free place", |status| status.sessions.is_empty())
        .await;
    assert!(world.client.generate(request(2)).await.is_ok());
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_given_up() {
    let mut config = quick_config();
    config.client_stall_timeout = Duration::from_millis(200);
    let mut world = world_with(
        Script {
            // Text enough to fill every buffer on the way.
            block: 400,
            model: specattn_proto::v1::ModelInfo {
                max_context: 200_000,
                ..model()
            },
            ..Script::default()
        },
        config,
    )
    .await;
    // A client whose connection buffers little.
    let channel = specattn_service::channel::endpoint(&world.gateway.uri)
        .unwrap()
        .initial_stream_window_size(1 << 16)
        .connect()
        .await
        .unwrap();
    let mut request = request(190_000);
    request.sampling = Some(Sampling {
        logprobs: Some(0),
        ..Sampling::default()
    });
    let stream = GenerationServiceClient::new(channel)
        .generate(request)
        .await
        .unwrap()
        .into_inner();
    world
        .client
        .wait_for("the session", |status| !status.sessions.is_empty())
        .await;
    world
        .client
        .wait_for("the session's end", |status| status.sessions.is_empty())
        .await;
    let got = read(stream).await;
    assert_eq!(got.fault.unwrap().label(), "resource_exhausted");
    assert!(got.finished.is_none() && !got.tokens.is_empty());
}

#[tokio::test]
async fn draining_refuses_new_sessions_and_ends() {
    let mut world = world(Script::default()).await;
    let stream = world.client.generate(request(30)).await.unwrap();
    world.gateway.shutdown.cancel();
    let got = read(stream).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Length);
    assert_eq!(
        world.client.refusal(request(2)).await.label(),
        "unavailable"
    );
    world.gateway.kill().await;
    drop(world.worker);
}

#[tokio::test]
async fn a_look_ahead_comes_with_its_text_and_is_withdrawn() {
    let script = Script {
        looks_ahead: true,
        pace: Duration::from_millis(30),
        ..says(" the end of it", 2)
    };
    let tokens = script.tokens.clone();
    let mut world = world(script).await;
    let mut asked = request(tokens.len() as u32);
    asked.provisional = true;
    let got = read(world.client.generate(asked).await.unwrap()).await;
    assert_eq!(got.tokens, tokens);
    assert!(world.verify.opened()[0].provisional);
    let first = &got.ahead[0];
    assert_eq!((first.start, &first.token_ids[..2]), (0, &tokens[..2]));
    // The third token shown was another: all but its text is the completion's.
    let shown = first.text.chars().zip(got.text.chars());
    assert!(shown.take_while(|(shown, said)| shown == said).count() > 0);
    assert_eq!(got.withdrawn, [2]);
}
