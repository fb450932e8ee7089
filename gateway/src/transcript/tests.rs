use super::*;

fn commit(tokens: &[u32], texts: &[&str]) -> Commit {
    Commit {
        tokens: tokens.to_vec(),
        texts: texts.iter().map(|&text| text.to_owned()).collect(),
        origins: Vec::new(),
        logprobs: Vec::new(),
    }
}

fn delta(start: u64, tokens: &[u32], text: &str, text_start: u64) -> Next {
    Next::Event(Event::Delta(Delta {
        start,
        token_ids: tokens.to_vec(),
        text: text.to_owned(),
        logprobs: Vec::new(),
        text_start,
    }))
}

#[test]
fn a_reader_is_sent_what_lies_behind_its_place() {
    let transcript = Arc::new(Transcript::new(vec![1, 2]));
    let mut reader = Reader::new(Arc::clone(&transcript), 0).unwrap();
    assert!(!reader.is_ready());
    assert_eq!(reader.next(), Next::Nothing);
    transcript.commit(commit(&[3], &["a"]));
    transcript.commit(commit(&[4, 5], &["", "bc"]));
    assert_eq!(reader.next(), delta(0, &[3, 4, 5], "abc", 0));
    // Another one has the first two tokens, of which the second had no certain text yet.
    let mut later = Reader::new(Arc::clone(&transcript), 2).unwrap();
    assert_eq!(later.next(), delta(2, &[5], "bc", 1));
    assert_eq!(later.next(), Next::Nothing);
    transcript.end("!", Ok(Finished::default()));
    for reader in [&mut reader, &mut later] {
        assert_eq!(reader.next(), delta(3, &[], "!", 3));
        assert_eq!(reader.next(), Next::End(Ok(Finished::default())));
    }
}

#[test]
fn no_reader_begins_beyond_the_end() {
    let transcript = Arc::new(Transcript::new(vec![1]));
    transcript.commit(commit(&[3], &["a"]));
    assert!(Reader::new(Arc::clone(&transcript), 1).is_ok());
    for from in [2, u64::MAX] {
        assert!(Reader::new(Arc::clone(&transcript), from).is_err());
    }
}

#[test]
fn only_what_was_shown_is_withdrawn() {
    let transcript = Arc::new(Transcript::new(vec![1]));
    let mut reader = Reader::new(Arc::clone(&transcript), 0).unwrap();
    transcript.look_ahead(vec![7, 8, 9], "xyz".to_owned());
    transcript.withdraw(2);
    transcript.look_ahead(vec![7, 8], "xy".to_owned());
    let Next::Event(Event::Provisional(ahead)) = reader.next() else {
        panic!("there is a look ahead");
    };
    assert_eq!(ahead.token_ids, [7, 8]);
    assert_eq!(reader.next(), Next::Nothing);
    // The second turns out wrong, and another takes its place.
    transcript.commit(commit(&[7, 5], &["x", "v"]));
    let withdrawn = Next::Event(Event::Withdrawn(Withdrawn { to: 1 }));
    assert_eq!(reader.next(), withdrawn);
    assert_eq!(reader.next(), delta(0, &[7, 5], "xv", 0));
    assert!(!reader.is_ready());
}

#[tokio::test]
async fn a_watcher_sees_tokens_one_by_one_and_how_they_came_about() {
    use TokenOrigin::{Accepted, Bonus, Unspecified};
    let transcript = Arc::new(Transcript::new(vec![1]));
    let mut watcher = Watcher::new(Arc::clone(&transcript));
    transcript.commit(Commit {
        origins: vec![Accepted, Bonus],
        ..commit(&[3, 4], &["a", ""])
    });
    let piece = |text: &str, origin| (text.to_owned(), origin);
    let news = watcher.next().await;
    assert_eq!(news.pieces, [piece("a", Accepted), piece("", Bonus)]);
    assert!(news.end.is_none());
    // Of a session taken from the log nobody knows.
    transcript.commit(commit(&[5], &["é"]));
    transcript.end("!", Ok(Finished::default()));
    let news = watcher.next().await;
    assert_eq!(
        news.pieces,
        [piece("é", Unspecified), piece("!", Unspecified)]
    );
    assert!(news.end.is_some());
}
