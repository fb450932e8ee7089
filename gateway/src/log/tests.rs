use std::path::Path;
use std::time::Duration;

use specattn_proto::v1::{DraftPolicy, FinishReason, OpenRequest};

use super::*;

fn open(config: LogConfig) -> (SessionLog, JoinHandle<()>) {
    SessionLog::open(config).unwrap()
}

async fn close((log, thread): (SessionLog, JoinHandle<()>)) {
    log.close().await;
    thread.join().unwrap();
}

fn session(prompt: usize) -> LoggedSession {
    LoggedSession {
        open: Some(OpenRequest {
            token_ids: vec![7; prompt],
            ..OpenRequest::default()
        }),
        draft: Some(DraftPolicy::default()),
        max_tokens_total: 1_000,
        ..LoggedSession::default()
    }
}

fn tokens(start: u64, ids: &[u32]) -> LoggedTokens {
    LoggedTokens {
        start,
        token_ids: ids.to_vec(),
        elapsed_us: 10 + start,
        ..LoggedTokens::default()
    }
}

fn end() -> LoggedEnd {
    LoggedEnd {
        reason: FinishReason::Length.into(),
        ended_unix_ms: crate::recipe::unix_ms(),
        ..LoggedEnd::default()
    }
}

fn id(number: u128) -> SessionId {
    SessionId::from_bits(number)
}

fn files(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test]
async fn what_was_logged_is_found_again_by_the_next_gateway() {
    for fsync in [Fsync::Never, Fsync::Interval, Fsync::Commit] {
        let dir = tempfile::tempdir().unwrap();
        let config = LogConfig {
            fsync,
            ..LogConfig::new(dir.path())
        };
        let first = open(config.clone());
        let writer = first.0.begin(id(1), session(3)).await.unwrap();
        let other = first.0.begin(id(2), session(4)).await.unwrap();
        writer.append(tokens(0, &[1, 2])).await.unwrap();
        other.append(tokens(0, &[9])).await.unwrap();
        writer.append(tokens(2, &[3])).await.unwrap();
        writer.end(end()).await.unwrap();
        let (stored, _writer) = first.0.load(id(1)).await.unwrap().unwrap();
        assert_eq!(stored.tokens, [1, 2, 3]);
        assert!(first.0.load(id(3)).await.unwrap().is_none());
        close(first).await;

        let second = open(config);
        assert_eq!(
            files(dir.path()).len(),
            1,
            "the first one's file is taken over"
        );
        let (stored, _writer) = second.0.load(id(1)).await.unwrap().unwrap();
        assert_eq!(
            (stored.session, stored.first_token_us),
            (session(3), Some(10))
        );
        assert_eq!(stored.end.unwrap().reason(), FinishReason::Length);
        let (stored, writer) = second.0.load(id(2)).await.unwrap().unwrap();
        assert_eq!((stored.tokens, stored.end), (vec![9], None));
        writer.append(tokens(1, &[10])).await.unwrap();
        let (stored, _writer) = second.0.load(id(2)).await.unwrap().unwrap();
        assert_eq!(stored.tokens, [9, 10]);
        close(second).await;
    }
}

#[tokio::test]
async fn a_live_gateway_keeps_its_file_and_a_dead_ones_is_found_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(LogConfig::new(dir.path()));
    let second = open(LogConfig::new(dir.path()));
    let writer = first.0.begin(id(1), session(3)).await.unwrap();
    writer.append(tokens(0, &[1, 2])).await.unwrap();
    assert!(second.0.load(id(1)).await.unwrap().is_none());
    close(first).await;
    let (stored, _writer) = second.0.load(id(1)).await.unwrap().unwrap();
    assert_eq!(stored.tokens, [1, 2]);
    close(second).await;
}

#[tokio::test]
async fn a_torn_end_and_strange_files_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(LogConfig::new(dir.path()));
    let writer = first.0.begin(id(1), session(3)).await.unwrap();
    for start in 0..5 {
        writer.append(tokens(start, &[start as u32])).await.unwrap();
    }
    close(first).await;
    let path = files(dir.path()).remove(0);
    let whole = std::fs::read(&path).unwrap();
    // Every length a failure of power may leave.
    for cut in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..cut]).unwrap();
        std::fs::write(dir.path().join("strange.log"), b"something else").unwrap();
        std::fs::write(dir.path().join("left.tmp"), b"half made").unwrap();
        let log = open(LogConfig::new(dir.path()));
        if let Some((stored, _writer)) = log.0.load(id(1)).await.unwrap() {
            let expected: Vec<u32> = (0..stored.tokens.len() as u32).collect();
            assert_eq!(stored.tokens, expected);
        }
        close(log).await;
        assert!(dir.path().join("strange.log").exists());
        for path in files(dir.path()) {
            std::fs::remove_file(path).unwrap();
        }
    }
    // A flipped bit ends the log before its record.
    let mut flipped = whole.clone();
    let at = flipped.len() - 3;
    flipped[at] ^= 1;
    std::fs::write(&path, &flipped).unwrap();
    let log = open(LogConfig::new(dir.path()));
    let (stored, _writer) = log.0.load(id(1)).await.unwrap().unwrap();
    assert_eq!(stored.tokens, [0, 1, 2, 3]);
    close(log).await;
}

#[tokio::test]
async fn ended_sessions_make_room_and_running_ones_fill_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let config = LogConfig {
        size_bytes: 64 << 10,
        ..LogConfig::new(dir.path())
    };
    let log = open(config.clone());
    // Many times the log's size, one after another.
    for number in 0..200 {
        let writer = log.0.begin(id(number), session(1_000)).await.unwrap();
        writer
            .append(tokens(0, &[number as u32; 100]))
            .await
            .unwrap();
        writer.end(end()).await.unwrap();
    }
    let size = || log.0.usage().0;
    assert!(size() <= config.size_bytes, "{} bytes", size());
    assert!(log.0.load(id(0)).await.unwrap().is_none());
    let (stored, _writer) = log.0.load(id(199)).await.unwrap().unwrap();
    assert_eq!(stored.tokens, [199; 100]);

    // Sessions that run are not dropped: at some point there is no room, and nothing of what was said is lost.
    let mut running = Vec::new();
    let refused = loop {
        let number = 1_000 + running.len() as u128;
        match log.0.begin(id(number), session(1_000)).await {
            Ok(writer) => running.push(writer),
            Err(fault) => break fault,
        }
        assert!(running.len() < 100);
    };
    assert!(matches!(
        refused,
        Fault::ResourceExhausted {
            retry_after: Some(_),
            ..
        }
    ));
    let big = tokens(0, &[70_000; 1_000]);
    let refused = running[0].append(big.clone()).await.unwrap_err();
    assert_eq!(refused.label(), "resource_exhausted");
    running.truncate(running.len() / 2);
    running[0].append(big.clone()).await.unwrap();
    drop(running);
    close(log).await;
    let log = open(config);
    let (stored, _writer) = log.0.load(id(1_000)).await.unwrap().unwrap();
    assert_eq!(stored.tokens, big.token_ids);
    close(log).await;
}

#[tokio::test]
async fn sessions_are_kept_for_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(LogConfig {
        keep: Duration::from_millis(300),
        size_bytes: 16 << 10,
        ..LogConfig::new(dir.path())
    });
    let ended = log.0.begin(id(1), session(10)).await.unwrap();
    ended.end(end()).await.unwrap();
    let running = log.0.begin(id(2), session(10)).await.unwrap();
    drop(ended);
    tokio::time::sleep(Duration::from_millis(400)).await;
    // The next time that room is needed.
    for number in 10..80 {
        let writer = log.0.begin(id(number), session(500)).await.unwrap();
        writer.end(end()).await.unwrap();
    }
    assert!(log.0.load(id(1)).await.unwrap().is_none());
    running.append(tokens(0, &[1])).await.unwrap();
    close(log).await;
}

#[tokio::test]
async fn many_sessions_write_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(LogConfig {
        fsync: Fsync::Commit,
        ..LogConfig::new(dir.path())
    });
    let mut tasks = Vec::new();
    for number in 0..64 {
        let log = log.0.clone();
        tasks.push(tokio::spawn(async move {
            let writer = log.begin(id(number), session(2)).await.unwrap();
            for start in 0..20 {
                writer
                    .append(tokens(start, &[number as u32]))
                    .await
                    .unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    for number in 0..64 {
        let (stored, _writer) = log.0.load(id(number)).await.unwrap().unwrap();
        assert_eq!(stored.tokens, [number as u32; 20]);
    }
    close(log).await;
}
