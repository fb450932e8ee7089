//! Keys and secrets: who shows the right one is served, nobody else is, and no log tells of them or of prompts.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use prost::Message;
use prost_types::FileDescriptorSet;
use specattn_proto::FILE_DESCRIPTOR_SET;
use specattn_proto::v1::{
    CancelRequest, RegisterRequest, Registration, ResumeRequest, WorkerRole, register_request,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::Secrets;
use specattn_service::channel::{Dialer, Link};
use specattn_tests::certificates::{Authority, caller, flags};
use specattn_tests::cluster::gateway_at;
use specattn_tests::process::{DRAFT, VERIFY, free_address};
use specattn_tests::stranger::{join, join_request, model_info};
use specattn_tests::{Process, Request, https, python, raw, until};
use tempfile::TempDir;
use tonic::Code;

/// A prompt that must not turn up anywhere.
const PROMPT: &str = "The heron's umbrella was made of marzipan";

/// Runs `specattn key` and gives what it prints.
fn key(arguments: &[&str]) -> String {
    let output = Command::new(python::specattn())
        .arg("key")
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A cluster by TLS with keys for clients and a secret for each kind of worker.
struct World {
    dir: TempDir,
    authority: Authority,
    gateway: Process,
    verify: Process,
    draft: Process,
    alice: String,
    bob: String,
    operator: String,
    late: String,
    verify_secret: String,
    draft_secret: String,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::new(dir.path(), "ours");
        let file = |name: &str| -> PathBuf { dir.path().join(name) };
        let keys = file("keys.json");
        let new = |name: &str, more: &[&str]| {
            let line = ["new", name, "--api-keys", text(&keys)];
            key(&[&line[..], more].concat())
        };
        let (alice, bob) = (new("alice", &[]), new("bob", &[]));
        let operator = new("otto", &["--operator"]);
        let late = new("late", &["--expires-days", "0"]);
        let (verify_secret, draft_secret) = (key(&["secret"]), key(&["secret"]));
        std::fs::write(file("verify"), &verify_secret).unwrap();
        std::fs::write(file("draft"), &draft_secret).unwrap();

        let tls = flags(&authority.good(), &authority);
        let with = |more: &[&str]| -> Vec<String> {
            let more = more.iter().map(ToString::to_string);
            tls.iter().cloned().chain(more).collect()
        };
        let line = with(&[
            "--log-level",
            "debug",
            "--api-keys",
            text(&keys),
            "--worker-secret-file",
            text(&file("verify")),
            "--draft-secret-file",
            text(&file("draft")),
        ]);
        let gateway = gateway_at(&free_address(), &refs(&line)).await;
        let uri = https_uri(&gateway);
        let worker = |name: &'static str, secret: PathBuf| {
            let line = with(&[
                "--log-level",
                "debug",
                "--gateway",
                &uri,
                "--worker-secret-file",
                text(&secret),
            ]);
            async move { Process::worker(name, &refs(&line)).await }
        };
        let verify = worker(VERIFY, file("verify")).await;
        let draft = worker(DRAFT, file("draft")).await;
        let world = Self {
            authority,
            gateway,
            verify,
            draft,
            alice,
            bob,
            operator,
            late,
            verify_secret,
            draft_secret,
            dir,
        };
        until("two workers", || async { world.workers().await == 2 }).await;
        world
    }

    /// A link that shows a token, or nothing; never a certificate.
    async fn link(&self, process: &Process, token: Option<&str>) -> Link {
        let tls = caller(None, &self.authority).load().unwrap();
        let secrets = token.map(|token| Secrets::of(token).unwrap());
        let dialer = Dialer::new(tls, secrets);
        dialer.connect(&https_uri(process)).await.unwrap()
    }

    /// Calls a method with an empty message.
    async fn ask(&self, process: &Process, token: Option<&str>, method: &str) -> (usize, Code) {
        let link = self.link(process, token).await;
        let (answers, status) = raw::call(link, method, vec![Vec::new()]).await;
        (answers, status.code())
    }

    async fn workers(&self) -> usize {
        use specattn_proto::v1::StatusRequest;
        use specattn_proto::v1::registry_service_client::RegistryServiceClient;

        let link = self.link(&self.gateway, Some(&self.operator)).await;
        let status = RegistryServiceClient::new(link)
            .status(StatusRequest {})
            .await;
        status.unwrap().into_inner().workers.len()
    }
}

fn https_uri(process: &Process) -> String {
    process.uri().replacen("http", "https", 1)
}

fn refs(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

/// Every method of our package, as `Service/Method`.
fn methods(service: &str) -> Vec<String> {
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap();
    let services = set.file.iter().flat_map(|file| &file.service);
    let found: Vec<String> = services
        .filter(|found| found.name() == service)
        .flat_map(|found| &found.method)
        .map(|method| format!("{service}/{}", method.name()))
        .collect();
    assert!(!found.is_empty(), "{service} has methods");
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_those_who_show_the_right_thing_are_served() {
    let world = World::start().await;
    let (most, last) = world.alice.split_at(world.alice.len() - 1);
    let wrong = format!("{most}{}", if last == "x" { "y" } else { "x" });
    let strangers = [None, Some(wrong.as_str()), Some(&*world.late)];
    let verify_secret = Some(world.verify_secret.as_str());
    let draft_secret = Some(world.draft_secret.as_str());
    let alice = Some(world.alice.as_str());
    let links: [(&Process, &str, Vec<Option<&str>>); 4] = [
        // Secrets of workers are no keys of clients.
        (
            &world.gateway,
            "GenerationService",
            vec![verify_secret, draft_secret],
        ),
        (&world.gateway, "RegistryService", vec![]),
        (&world.verify, "VerifyService", vec![alice, draft_secret]),
        (&world.draft, "DraftService", vec![alice, verify_secret]),
    ];
    for (process, service, more) in links {
        for method in methods(service) {
            // It checks for itself what a session wants of its drafts: below.
            if method == "VerifyService/Speculate" {
                continue;
            }
            for token in strangers.iter().chain(&more) {
                let answer = world.ask(process, *token, &method).await;
                assert_eq!(answer, (0, Code::Unauthenticated), "{method}");
            }
        }
    }
    let register = "RegistryService/Register";
    assert_eq!(
        world.ask(&world.gateway, alice, register).await.1,
        Code::Unauthenticated
    );
    let status = "RegistryService/Status";
    assert_eq!(
        world.ask(&world.gateway, alice, status).await.1,
        Code::PermissionDenied
    );
    let operator = Some(world.operator.as_str());
    assert_eq!(
        world.ask(&world.gateway, operator, status).await,
        (1, Code::Ok)
    );
    assert_eq!(
        world.ask(&world.gateway, verify_secret, status).await,
        (1, Code::Ok)
    );
    let load = "VerifyService/VerifyStatus";
    assert_eq!(
        world.ask(&world.verify, verify_secret, load).await,
        (1, Code::Ok)
    );

    // A draft's secret makes nobody a verify worker.
    let registration = |role: WorkerRole| {
        let registration = Registration {
            role: role.into(),
            endpoint: "https://127.0.0.1:1".to_owned(),
            model: Some(model_info()),
            load: None,
            protocol_version: PROTOCOL_VERSION,
            build: String::new(),
        };
        let message = RegisterRequest {
            message: Some(register_request::Message::Registration(registration)),
        };
        vec![message.encode_to_vec()]
    };
    for (token, role, answer) in [
        (
            &world.draft_secret,
            WorkerRole::Verify,
            Code::PermissionDenied,
        ),
        (
            &world.verify_secret,
            WorkerRole::Draft,
            Code::PermissionDenied,
        ),
        (&world.draft_secret, WorkerRole::Draft, Code::Ok),
    ] {
        let link = world.link(&world.gateway, Some(token)).await;
        let (_, status) = raw::call(link, register, registration(role)).await;
        assert_eq!(status.code(), answer, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn http_wants_the_same_keys() {
    let world = World::start().await;
    let address = world.gateway.uri().trim_start_matches("http://");
    let authority = &world.authority;
    let send = |request: String| async move { https::request(address, authority, &request).await };
    let alice = Some(world.alice.as_str());
    let body = r#"{"prompt": "Once", "max_tokens": 4}"#;
    let (status, answer) = send(https::post("/v1/completions", alice, body)).await;
    assert_eq!(status, 200, "{answer}");
    for token in [
        None,
        Some("nonsense"),
        Some(&*world.late),
        Some(&*world.verify_secret),
    ] {
        for request in [
            https::get("/v1/models", token),
            https::post("/v1/completions", token, body),
            https::post("/v1/chat/completions", token, "{}"),
        ] {
            let (status, answer) = send(request).await;
            assert_eq!(status, 401, "{answer}");
            let error: serde_json::Value = serde_json::from_str(&answer).unwrap();
            assert_eq!(error["error"]["code"], "invalid_api_key");
        }
    }
    let metrics = |process: &Process, token: Option<&str>| {
        let address = process.uri().trim_start_matches("http://").to_owned();
        let request = https::get("/metrics", token);
        async move { https::request(&address, authority, &request).await.0 }
    };
    assert_eq!(metrics(&world.verify, None).await, 403);
    assert_eq!(metrics(&world.verify, alice).await, 403);
    assert_eq!(
        metrics(&world.verify, Some(&world.verify_secret)).await,
        200
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sessions_belong_to_keys_and_drafts() {
    let world = World::start().await;
    let request = Request::tokens(&[5, 6, 7], 4_000).draft_length(4);
    let mut stream = request
        .start(world.link(&world.gateway, Some(&world.alice)).await)
        .await
        .unwrap();
    let id = {
        let completion = stream.at_least(4).await.unwrap();
        completion.started.as_ref().unwrap().session_id.clone()
    };
    let resume = ResumeRequest {
        session_id: id.clone(),
        from_index: 0,
    };
    let cancel = CancelRequest {
        session_id: id.clone(),
    };
    let calls = [
        ("GenerationService/Resume", resume.encode_to_vec()),
        ("GenerationService/Cancel", cancel.encode_to_vec()),
    ];
    for (method, message) in &calls {
        let link = world.link(&world.gateway, Some(&world.bob)).await;
        let (answers, status) = raw::call(link, method, vec![message.clone()]).await;
        assert_eq!((answers, status.code()), (0, Code::NotFound), "{method}");
    }
    // The session's id alone opens nothing at its verify worker, whatever else is shown.
    for token in [None, Some(world.verify_secret.as_str())] {
        let link = world.link(&world.verify, token).await;
        let stolen = join_request(join(&id, 3)).encode_to_vec();
        let (answers, status) = raw::call(link, "VerifyService/Speculate", vec![stolen]).await;
        assert_eq!(
            (answers, status.code()),
            (0, Code::PermissionDenied),
            "{status}"
        );
    }
    let (method, message) = &calls[1];
    let link = world.link(&world.gateway, Some(&world.alice)).await;
    let (answers, _) = raw::call(link, method, vec![message.clone()]).await;
    assert_eq!(answers, 1);
    let completion = stream.finish().await.unwrap();
    assert!(completion.stats.accepted_tokens > 0, "a draft was attached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn logs_tell_neither_prompts_nor_secrets() {
    let world = World::start().await;
    let address = world.gateway.uri().trim_start_matches("http://");
    let alice = Some(world.alice.as_str());
    let bodies = [
        format!(r#"{{"prompt": "{PROMPT}", "max_tokens": 8}}"#),
        // Refused for all kinds of reasons, each of which is told.
        format!(r#"{{"prompt": {{"{PROMPT}": 1}}}}"#),
        format!(r#"{{"prompt": "{PROMPT}", "model": "{PROMPT}"}}"#),
        format!(r#"{{"prompt": "x", "max_tokens": "{PROMPT}"}}"#),
        format!(r#"{{"prompt": "x", "stop": ["{}"]}}"#, PROMPT.repeat(100)),
        format!(r#"{{"messages": [{{"role": "user", "content": "{PROMPT}"}}]}}"#),
        format!(r#"{{"prompt": "{PROMPT}" "{PROMPT}""#),
    ];
    for (index, body) in bodies.iter().enumerate() {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let request = https::post(path, alice, body);
            let (status, answer) = https::request(address, &world.authority, &request).await;
            let well = index == 0 && path == "/v1/completions";
            assert_eq!(status == 200, well, "{path} {body}: {answer}");
        }
    }
    let request = https::get("/v1/models", Some("sk-specattn-nonsense"));
    let (status, _) = https::request(address, &world.authority, &request).await;
    assert_eq!(status, 401);
    let mut written = String::new();
    for process in [&world.gateway, &world.verify, &world.draft] {
        let log = process.log();
        assert!(log.contains("session"), "it has logged something: {log}");
        written += &log;
    }
    let secret = [
        PROMPT,
        "heron",
        "marzipan",
        &world.alice,
        &world.verify_secret,
        &world.draft_secret,
        "sk-specattn-nonsense",
        "draft_capability",
    ];
    for text in secret {
        if let Some(line) = written.lines().find(|line| line.contains(text)) {
            panic!("a log tells {text:?}: {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_key_that_is_taken_away_opens_nothing() {
    let world = World::start().await;
    let models = || async {
        let address = world.gateway.uri().trim_start_matches("http://").to_owned();
        let request = https::get("/v1/models", Some(&world.alice));
        https::request(&address, &world.authority, &request).await.0
    };
    assert_eq!(models().await, 200);
    std::fs::write(world.dir.path().join("keys.json"), r#"{"keys": []}"#).unwrap();
    until("the key to be forgotten", || async {
        models().await == 401
    })
    .await;
}

/// Runs a service that should not start; what it says.
fn refused(name: &str, arguments: &[&str]) -> String {
    let binary = specattn_tests::binaries::path(name);
    let output = Command::new(binary).args(arguments).output().unwrap();
    assert!(!output.status.success(), "{name} {arguments:?} starts");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_is_exposed_unless_told_in_words() {
    let target = specattn_tests::process::target();
    let target = text(&target);
    let cases: [(&str, &[&str]); 3] = [
        ("specattn-gateway", &["--tokenizer", target]),
        (VERIFY, &["--model", target]),
        (DRAFT, &["--model", target]),
    ];
    for (name, arguments) in cases {
        let everywhere = ["--listen", "0.0.0.0:0", "--advertise", "http://127.0.0.1:1"];
        let line = [&everywhere[..], arguments].concat();
        let said = refused(name, &line);
        assert!(said.contains("--insecure-allow-anyone"), "{name}: {said}");
    }
    let half = refused(VERIFY, &["--model", target, "--tls-cert", "nowhere"]);
    assert!(half.contains("--tls-key"), "{half}");
    let short = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(short.path(), "short").unwrap();
    let weak = refused(
        VERIFY,
        &[
            "--model",
            target,
            "--worker-secret-file",
            text(short.path()),
        ],
    );
    assert!(weak.contains("32"), "{weak}");

    let port = free_address();
    let everywhere = port.replace("127.0.0.1", "0.0.0.0");
    let told = [
        "--insecure-allow-anyone",
        "--advertise",
        "http://127.0.0.1:1",
    ];
    let gateway = gateway_at(&everywhere, &told).await;
    drop(gateway);
    // With keys for clients it starts, but takes no workers from elsewhere.
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys.json");
    let alice = key(&["new", "alice", "--api-keys", text(&keys)]);
    let keyed = [
        "--api-keys",
        text(&keys),
        "--advertise",
        "http://127.0.0.1:1",
    ];
    let gateway = gateway_at(&everywhere, &keyed).await;
    let dialer = Dialer::new(None, Some(Secrets::of(&alice).unwrap()));
    let link = dialer.connect(gateway.uri()).await.unwrap();
    let (_, status) = raw::call(link, "RegistryService/Register", vec![Vec::new()]).await;
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
}

#[test]
fn one_process_serves_with_keys_and_tls_too() {
    use std::io::{BufRead, BufReader};

    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let keys = dir.path().join("keys.json");
    let alice = key(&["new", "alice", "--api-keys", text(&keys)]);
    let mut line = flags(&authority.good(), &authority);
    line.extend(["--api-keys".to_owned(), text(&keys).to_owned()]);
    let mut serving = Command::new(python::specattn())
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--quiet",
            "--threads",
            "1",
        ])
        .args(&line)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut url = String::new();
    let mut said = BufReader::new(serving.stdout.take().unwrap());
    said.read_line(&mut url).unwrap();
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let generate = |key: Option<&str>| {
        let mut command = Command::new(python::specattn());
        command.args(["generate", "Once", "-n", "8", "--gateway", url.trim()]);
        command.arg("--tls-ca").arg(authority.file());
        match key {
            Some(key) => command.env("SPECATTN_API_KEY", key),
            None => command.env_remove("SPECATTN_API_KEY"),
        };
        command.output().unwrap()
    };
    let told = generate(Some(&alice));
    assert!(told.status.success(), "{told:?}");
    assert!(!told.stdout.is_empty());
    let refused = generate(None);
    assert!(!refused.status.success());
    let reason = String::from_utf8_lossy(&refused.stderr);
    assert!(reason.contains("unauthenticated"), "{reason}");
    serving.kill().unwrap();
    serving.wait().unwrap();
}
