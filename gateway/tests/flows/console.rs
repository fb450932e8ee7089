//! What the console's page is served and told.

use crate::http::get;
use crate::support::*;
use serde_json::{Value, json};
use specattn_proto::v1::generate_response::Event;
use std::time::Duration;

/// The lines of JSON in a body, however it was cut into chunks.
fn lines(body: &str) -> Vec<Value> {
    body.lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[tokio::test]
async fn the_page_comes_whole_and_keeps_to_itself() {
    let gateway = start_gateway(quick_config()).await;
    let (status, head, _) = get(&gateway, "/").await;
    assert_eq!(status, 307);
    assert!(head.contains("location: /console"), "{head}");
    let (status, head, body) = get(&gateway, "/console").await;
    assert_eq!(status, 200);
    assert!(
        head.contains("content-security-policy: default-src 'self'"),
        "{head}"
    );
    assert!(body.ends_with("</html>\n"));
    let (status, head, _) = get(&gateway, "/console/app.js").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/javascript"), "{head}");
    for missing in [
        "/console/nothing.js",
        "/console/..%2fCargo.toml",
        "/console/sessions/00000000000000000000000000000000",
        "/console/sessions/00000000000000000000000000000000/kept",
    ] {
        assert_eq!(get(&gateway, missing).await.0, 404, "{missing}");
    }
    assert_eq!(get(&gateway, "/console/sessions/nonsense").await.0, 400);
}

#[tokio::test]
async fn a_session_is_told_token_by_token_while_it_runs_and_after() {
    let gateway = start_gateway(quick_config()).await;
    let script = Script {
        tokens: ids(" one two three four five six seven"),
        pace: Duration::from_millis(20),
        ..Script::default()
    };
    let _worker = FakeVerify::new(script).start(Some(&gateway.uri)).await;
    let mut client = Client::new(&gateway).await;
    client.wait_for_workers(1).await;
    let mut stream = client.generation.generate(request(30)).await.unwrap();
    let started = stream.get_mut().message().await.unwrap().unwrap();
    let Some(Event::Started(started)) = started.event else {
        panic!("{started:?}");
    };
    let path = format!("/console/sessions/{}", started.session_id);
    let got = Received {
        started: Some(started.clone()),
        ..Received::default()
    };
    let watching = async { lines(&get(&gateway, &path).await.2) };
    let looking = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (_, _, kept) = get(&gateway, &format!("{path}/kept")).await;
        (get(&gateway, "/console/status").await.2, kept)
    };
    let (watched, (status, kept), read) =
        tokio::join!(watching, looking, read_on(stream.into_inner(), got));

    let status: Value = serde_json::from_str(&status).unwrap();
    assert_eq!(status["sessions"][0]["session_id"], started.session_id);
    assert_eq!(status["workers"][0]["model"], "fake");
    let kept: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(kept["num_layers"], 2);
    assert_eq!(kept["kept"][0], 255);

    assert_eq!(watched[0], json!({"prompt_tokens": started.prompt_tokens}));
    assert!(watched.len() > 5, "it was told as it went: {watched:?}");
    let pieces: Vec<&Value> = watched
        .iter()
        .filter_map(|line| line["pieces"].as_array())
        .flatten()
        .collect();
    let text: String = pieces.iter().filter_map(|p| p[0].as_str()).collect();
    assert_eq!(text, read.text);
    let origins: Vec<i64> = pieces.iter().filter_map(|p| p[1].as_i64()).collect();
    assert_eq!(origins[..6], [1, 1, 3, 1, 1, 3]);
    assert_eq!(watched.last().unwrap()["end"], "finished: length");

    // It can be looked at for a while after its end, and runs nowhere then.
    let later = lines(&get(&gateway, &path).await.2);
    assert_eq!(later.last().unwrap()["end"], "finished: length");
    let (status, _, kept) = get(&gateway, &format!("{path}/kept")).await;
    assert_eq!(status, 200, "{kept}");
}
