//! Greedy dense output equals transformers in float32, token for token, whoever drafts and however far ahead.
//!
//! The reference is `tests/fixtures/greedy_bundled.json`; its smallest logit gap is 0.002, far above what rounding can
//! turn round, so no tie excuses a difference. `engine/tests/greedy.rs` decodes the same prompts without any service.

use specattn_tests::texts::{Reference, references};
use specattn_tests::{Cluster, Request};

/// Continues every prompt through the gateway and compares; gives (proposed, accepted).
async fn compare(cluster: &Cluster, references: &[Reference], draft_length: u32) -> (u64, u64) {
    let channel = cluster.channel().await;
    let (mut proposed, mut accepted) = (0, 0);
    let mut wrong = Vec::new();
    for (index, reference) in references.iter().enumerate() {
        let request = Request::tokens(&reference.prompt, reference.greedy.len() as u32)
            .draft_length(draft_length);
        let completion = request.run(channel.clone()).await.expect("a continuation");
        let same = completion.tokens.iter().zip(&reference.greedy);
        let equal = same.take_while(|(got, want)| got == want).count();
        if completion.tokens != reference.greedy {
            let length = reference.prompt.len();
            wrong.push(format!(
                "prompt {index} of {length} tokens: {equal} tokens equal"
            ));
        }
        assert_eq!(
            completion.stats.kv_entries_read, completion.stats.kv_entries_dense,
            "dense mode reads everything"
        );
        proposed += completion.stats.proposed_tokens;
        accepted += completion.stats.accepted_tokens;
    }
    assert!(
        wrong.is_empty(),
        "draft length {draft_length}:\n{}",
        wrong.join("\n")
    );
    (proposed, accepted)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_a_draft_worker() {
    let references = references();
    assert_eq!(references.len(), 20);
    let cluster = Cluster::start(1).await;
    for draft_length in [0, 1, 4, 8] {
        let (proposed, accepted) = compare(&cluster, &references, draft_length).await;
        println!("draft length {draft_length}: {accepted} of {proposed} proposed tokens accepted");
        if draft_length == 0 {
            assert_eq!(proposed, 0, "no draft takes part at length 0");
        } else {
            assert!(
                accepted > 0,
                "the draft takes part at length {draft_length}"
            );
            assert!(
                accepted < proposed,
                "it is wrong now and then: rollback took part too"
            );
        }
    }
    cluster.is_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_draft_worker() {
    let references = references();
    let cluster = Cluster::start(0).await;
    let (proposed, _) = compare(&cluster, &references, 4).await;
    assert_eq!(proposed, 0, "nobody is there to draft");
    cluster.is_idle().await;
}

/// Sessions that run side by side share the engine, and none of them shows it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_several_sessions_at_once() {
    let references = references();
    let cluster = Cluster::start(1).await;
    let channel = cluster.channel().await;
    let mut sessions = Vec::new();
    for (index, reference) in references.iter().take(12).enumerate() {
        let request = Request::tokens(&reference.prompt, reference.greedy.len() as u32)
            .draft_length([0, 4, 8][index % 3]);
        sessions.push(tokio::spawn(request.run(channel.clone())));
    }
    for (index, (session, reference)) in sessions.into_iter().zip(&references).enumerate() {
        let completion = session.await.expect("the session's task").unwrap();
        assert_eq!(completion.tokens, reference.greedy, "prompt {index}");
    }
    cluster.is_idle().await;
}
