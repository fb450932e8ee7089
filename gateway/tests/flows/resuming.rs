//! Sessions that outlive what carried them: a verify worker, a client's connection, a gateway.

use std::path::Path;
use std::time::Duration;

use crate::support::*;
use specattn_gateway::{Config, LogConfig};
use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{CancelRequest, FinishReason, GenerateResponse, ModelInfo, Sampling};
use tonic::Streaming;

fn logged(dir: &Path) -> Config {
    let mut config = quick_config();
    config.log = Some(LogConfig::new(dir));
    config.linger = Some(Duration::from_millis(100));
    config
}

/// Says a text over and over, slowly enough to be interrupted.
fn story() -> Script {
    Script {
        tokens: ids(" naïve 東京 🦀, “quoted”, and so on"),
        block: 2,
        pace: Duration::from_millis(4),
        ..Script::default()
    }
}

/// What a story of `count` tokens comes to.
fn told(count: usize) -> (Vec<u32>, String) {
    let tokens: Vec<u32> = story().tokens.into_iter().cycle().take(count).collect();
    let text = tokenizer().decode(&tokens, true).unwrap();
    // The first token of a text alone loses its space.
    (tokens, format!(" {}", text.trim_start()))
}

/// Reads until there are at least `tokens` tokens.
async fn some(stream: &mut Streaming<GenerateResponse>, tokens: usize) -> Received {
    let mut got = Received::default();
    while got.tokens.len() < tokens {
        match next(stream).await.unwrap() {
            Some(Event::Started(started)) => got.started = Some(started),
            Some(Event::Delta(delta)) => {
                got.tokens.extend(delta.token_ids);
                got.text.push_str(&delta.text);
            }
            other => panic!("{other:?}"),
        }
    }
    got
}

fn id(got: &Received) -> String {
    got.started.as_ref().unwrap().session_id.clone()
}

#[tokio::test]
async fn a_lost_worker_is_replaced_and_statistics_add_up() {
    let gateway = start_gateway(quick_config()).await;
    let dying = FakeVerify::new(Script {
        hangs_up_at: Some(20),
        ..story()
    });
    let _dying = dying.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let stream = client.generate(request(60)).await.unwrap();
    let steady = FakeVerify::new(story());
    let _steady = steady.start(Some(&gateway.uri)).await;
    let got = read(stream).await;
    let (tokens, text) = told(60);
    assert_eq!((got.tokens, got.text), (tokens.clone(), text));
    let finished = got.finished.unwrap();
    assert_eq!(finished.reason(), FinishReason::Length);
    let stats = finished.stats.unwrap();
    assert_eq!((stats.target_forwards, stats.completion_tokens), (60, 60));
    assert_eq!(stats.prompt_tokens, 3);
    let again = &steady.opened()[0];
    assert_eq!(
        (again.prompt_tokens, &again.token_ids[3..]),
        (3, &tokens[..20])
    );
}

#[tokio::test]
async fn the_same_worker_takes_the_session_back_and_another_model_does_not() {
    let mut config = quick_config();
    config.reopen_timeout = Duration::from_secs(10);
    let gateway = start_gateway(config).await;
    let verify = FakeVerify::new(story());
    let worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(80)).await.unwrap();
    let first = some(&mut stream, 10).await;
    worker.kill().await;
    client.wait_for_workers(0).await;
    let other = FakeVerify::new(Script {
        model: ModelInfo {
            checkpoint_hash: "another".to_owned(),
            ..model()
        },
        ..story()
    });
    let _other = other.start(Some(&gateway.uri)).await;
    client.wait_for_workers(1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _worker = verify.start(Some(&gateway.uri)).await;
    let got = read_on(stream, first).await;
    assert_eq!(got.tokens, told(80).0);
    assert!(other.opened().is_empty());
    assert_eq!(verify.opened().len(), 2);
}

#[tokio::test]
async fn without_another_worker_the_client_is_told_after_a_while() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        hangs_up_at: Some(4),
        ..story()
    });
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    // It opens the session again and again, and gets no further.
    let got = read(client.generate(request(50)).await.unwrap()).await;
    let fault = got.fault.unwrap();
    assert_eq!(fault.label(), "unavailable", "{fault}");
    assert!(client.status().await.sessions.is_empty());
}

#[tokio::test]
async fn what_a_worker_says_twice_counts_once_and_one_that_contradicts_itself_is_left() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(Script {
        repeats: Some(0),
        ..story()
    });
    let worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let got = read(client.generate(request(30)).await.unwrap()).await;
    assert_eq!(got.tokens, told(30).0);
    worker.kill().await;
    client.wait_for_workers(0).await;

    for lying in [
        Script {
            repeats: Some(1),
            ..story()
        },
        Script {
            wrong_start: Some(5),
            ..story()
        },
    ] {
        let liar = FakeVerify::new(lying);
        let liar_worker = liar.start(Some(&gateway.uri)).await;
        client.wait_for_workers(1).await;
        // Nobody else is there: the client is told what is wrong.
        let got = read(client.generate(request(30)).await.unwrap()).await;
        assert_eq!(got.fault.unwrap().label(), "internal");
        // Where another one is, it goes on there.
        let honest = FakeVerify::new(story());
        let honest_worker = honest.start(Some(&gateway.uri)).await;
        client.wait_for_workers(2).await;
        for _ in 0..2 {
            let got = read(client.generate(request(30)).await.unwrap()).await;
            assert_eq!(got.tokens, told(30).0);
        }
        assert!(liar.opened().len() > 1, "the liar was asked too");
        liar_worker.kill().await;
        honest_worker.kill().await;
        client.wait_for_workers(0).await;
    }
}

#[tokio::test]
async fn a_client_comes_back_to_a_running_session() {
    for with_log in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = logged(dir.path());
        config.linger = Some(Duration::from_secs(5));
        if !with_log {
            config.log = None;
        }
        let gateway = start_gateway(config).await;
        let verify = FakeVerify::new(story());
        let _worker = verify.start(Some(&gateway.uri)).await;
        let mut client = Client::new(&gateway).await;
        client.wait_for_workers(1).await;
        let mut asked = request(100);
        asked.sampling = Some(Sampling {
            logprobs: Some(0),
            ..Sampling::default()
        });
        let mut stream = client.generate(asked).await.unwrap();
        let first = some(&mut stream, 21).await;
        drop(stream);
        let id = id(&first);
        client
            .wait_for("the client to be missed", |status| {
                !status.sessions[0].listening
            })
            .await;
        let (tokens, text) = told(100);
        // From any token on, in the middle of a character too.
        for from in [0, 1, 2, 3, 5, 8, first.tokens.len()] {
            let mut stream = client.resume(&id, from as u64).await.unwrap();
            let got = some(&mut stream, 1).await;
            assert!(tokens[from..].starts_with(&got.tokens), "from {from}");
        }
        let beyond = client.resume(&id, 1_000).await.map(drop).unwrap_err();
        assert_eq!(beyond.label(), "invalid_argument");
        let got = read_on(
            client.resume(&id, first.tokens.len() as u64).await.unwrap(),
            first,
        )
        .await;
        assert_eq!((&got.tokens, &got.text), (&tokens, &text));
        assert_eq!(verify.opened().len(), 1);
        // After the end only the log knows it.
        match client.resume(&id, 90).await {
            Ok(stream) => {
                let late = some_then_end(stream).await;
                assert!(with_log);
                assert_eq!(late.tokens, tokens[90..]);
                assert_eq!(late.logprobs.len(), 10);
                assert_eq!(late.finished, got.finished);
            }
            Err(fault) => assert!(!with_log && matches!(fault, Fault::NotFound(_))),
        }
    }
}

/// Reads a stream that begins in the middle.
async fn some_then_end(mut stream: Streaming<GenerateResponse>) -> Received {
    let mut got = Received::default();
    while let Some(event) = next(&mut stream).await.unwrap() {
        match event {
            Event::Delta(delta) => {
                got.tokens.extend(delta.token_ids);
                got.text.push_str(&delta.text);
                got.logprobs.extend(delta.logprobs);
            }
            Event::Finished(finished) => got.finished = Some(finished),
            Event::Started(started) => got.started = Some(started),
            other => panic!("{other:?}"),
        }
    }
    got
}

#[tokio::test]
async fn a_second_stream_takes_the_place_of_the_first() {
    let gateway = start_gateway(quick_config()).await;
    let verify = FakeVerify::new(story());
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(60)).await.unwrap();
    let first = some(&mut stream, 4).await;
    let second = client
        .resume(&id(&first), first.tokens.len() as u64)
        .await
        .unwrap();
    let fault = read_on(
        stream,
        Received {
            tokens: first.tokens.clone(),
            text: first.text.clone(),
            ..Received::default()
        },
    )
    .await
    .fault;
    assert_eq!(fault.unwrap().label(), "failed_precondition");
    let got = read_on(second, first).await;
    assert_eq!((got.tokens, got.text), told(60));
}

#[tokio::test]
async fn a_session_left_for_long_is_suspended_and_goes_on_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = start_gateway(logged(dir.path())).await;
    let verify = FakeVerify::new(story());
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut asked = request(200);
    asked.stop = vec!["so on on on".to_owned()];
    let mut stream = client.generate(asked).await.unwrap();
    let first = some(&mut stream, 11).await;
    drop(stream);
    client
        .wait_for("the session to be suspended", |status| {
            status.sessions.is_empty()
        })
        .await;
    assert_eq!(verify.running(), 0);
    let id = id(&first);
    let stream = client.resume(&id, first.tokens.len() as u64).await.unwrap();
    let got = read_on(stream, first).await;
    let (tokens, text) = told(200);
    assert_eq!((got.tokens, got.text), (tokens, text));
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Length);
    assert_eq!(verify.opened().len(), 2);
    let status = client.status().await.gateway.unwrap();
    assert!(status.log_bytes > 0 && status.log_sessions == 1);
    assert!(client.resume(&"0".repeat(32), 0).await.is_err());
}

#[tokio::test]
async fn another_gateway_takes_over_what_a_dead_one_left() {
    let dir = tempfile::tempdir().unwrap();
    let first_gateway = start_gateway(logged(dir.path())).await;
    let second_gateway = start_gateway(logged(dir.path())).await;
    let verify = FakeVerify::new(story());
    let one = verify.start(Some(&first_gateway.uri)).await;
    let mut client = Client::new(&first_gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(100)).await.unwrap();
    let first = some(&mut stream, 15).await;
    let mut stopped = request(50);
    stopped.stop = vec!["quoted".to_owned()];
    let ended = read(client.generate(stopped).await.unwrap()).await;
    first_gateway.kill().await;
    drop(one);

    let mut client = Client::new(&second_gateway).await;
    // Its worker is not there yet: the ended session needs none.
    let again = read(client.resume(&id(&ended), 0).await.unwrap()).await;
    assert_eq!((again.tokens, again.text), (ended.tokens, ended.text));
    assert_eq!(again.finished.unwrap().stop, "quoted");
    let _worker = verify.start(Some(&second_gateway.uri)).await;
    client.wait_for_workers(1).await;
    let stream = client
        .resume(&id(&first), first.tokens.len() as u64)
        .await
        .unwrap();
    let got = read_on(stream, first).await;
    assert_eq!((got.tokens, got.text), told(100));
    assert_eq!(got.finished.unwrap().stats.unwrap().completion_tokens, 100);
}

#[tokio::test]
async fn a_full_log_refuses_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = logged(dir.path());
    config.log.as_mut().unwrap().size_bytes = 2_500;
    let gateway = start_gateway(config).await;
    let verify = FakeVerify::new(Script {
        block: 1,
        ..story()
    });
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let got = read(client.generate(request(200)).await.unwrap()).await;
    let fault = got.fault.clone().unwrap();
    assert!(
        matches!(
            fault,
            Fault::ResourceExhausted {
                retry_after: Some(_),
                ..
            }
        ),
        "{fault:?}"
    );
    assert!(!got.tokens.is_empty() && got.tokens.len() < 200);
    assert_eq!(got.tokens, told(200).0[..got.tokens.len()]);
    gateway.kill().await;

    // With more room the session goes on where its client's tokens end.
    let gateway = start_gateway(logged(dir.path())).await;
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let (id, from) = (id(&got), got.tokens.len() as u64);
    let got = read_on(client.resume(&id, from).await.unwrap(), got).await;
    assert_eq!((got.tokens, got.text), told(200));
}

#[tokio::test]
async fn cancel_and_deadline_reach_a_session_between_workers() {
    let mut config = quick_config();
    config.reopen_timeout = Duration::from_secs(10);
    let gateway = start_gateway(config).await;
    let verify = FakeVerify::new(story());
    let worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generate(request(100)).await.unwrap();
    let first = some(&mut stream, 4).await;
    let mut late = request(100);
    late.deadline_ms = Some(700);
    let late = client.generate(late).await.unwrap();
    worker.kill().await;
    client.wait_for_workers(0).await;
    let session_id = id(&first);
    client
        .generation
        .cancel(CancelRequest { session_id })
        .await
        .unwrap();
    let got = read_on(stream, first).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Cancelled);
    let got = read(late).await;
    assert_eq!(got.finished.unwrap().reason(), FinishReason::Deadline);
}

#[tokio::test]
async fn requests_wait_in_turn_and_are_shed() {
    let mut config = quick_config();
    config.admission.sessions = 1;
    config.admission.queued = 1;
    config.admission.queue_timeout = Duration::from_secs(10);
    let gateway = start_gateway(config).await;
    let verify = FakeVerify::new(story());
    let _worker = verify.start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let running = client.generate(request(40)).await.unwrap();
    let mut second = client.clone();
    let waiting = tokio::spawn(async move { second.generate(request(4)).await });
    client
        .wait_for("a request in line", |status| {
            status.gateway.unwrap().requests_queued == 1
        })
        .await;
    let fault = client.refusal(request(4)).await;
    assert!(
        matches!(
            fault,
            Fault::ResourceExhausted {
                retry_after: Some(_),
                ..
            }
        ),
        "{fault:?}"
    );
    assert_eq!(read(running).await.tokens.len(), 40);
    let got = read(waiting.await.unwrap().unwrap()).await;
    assert_eq!(got.tokens.len(), 4);
}
