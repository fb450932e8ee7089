//! The program as a process: help, exit codes, and the whole system behind `generate`, `serve` and `status`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn specattn(line: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_specattn"));
    command.args(line).stdin(Stdio::null());
    command
}

fn run(line: &[&str]) -> Output {
    specattn(line).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Sends a signal by its name, through the tool for it: the test needs no unsafe code then.
fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([format!("-{name}"), child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

#[test]
fn help_tells_all() {
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    for command in ["generate", "serve", "status"] {
        assert!(text(&help.stdout).contains(command));
    }
    let generate = run(&["generate", "--help"]);
    assert_eq!(generate.status.code(), Some(0));
    let help = text(&generate.stdout);
    for flag in [
        "[PROMPT]",
        "--prompt-file",
        "--max-tokens",
        "--mode",
        "dense",
        "sparse",
        "exact",
        "approximate",
        "--confirm-length",
        "--refresh-every",
        "--max-kl",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--seed",
        "--repetition-penalty",
        "--presence-penalty",
        "--frequency-penalty",
        "--stop",
        "--stop-token",
        "--ignore-eos",
        "--deadline-ms",
        "--draft-length",
        "--no-draft",
        "--mask-p",
        "--sink",
        "--window",
        "--granularity",
        "--target",
        "--draft",
        "--threads",
        "--kv-cache-mib",
        "--gateway",
        "--json",
        "--quiet",
        "--log-level",
        "Exit codes",
    ] {
        assert!(help.contains(flag), "{flag} is missing in:\n{help}");
    }
    for line in [
        &["serve", "--help"][..],
        &["status", "--help"],
        &["--version"],
    ] {
        assert_eq!(run(line).status.code(), Some(0), "{line:?}");
    }
}

#[test]
fn bad_usage_exits_with_64() {
    let nowhere = "/nowhere/at/all";
    for line in [
        &["generate"][..],
        &["generate", "x", "--mode", "both"],
        &["generate", ""],
        &["generate", "x", "--mask-p", "2"],
        &["generate", "x", "--target", nowhere],
        &["generate", "x", "--log-level", "==="],
        &["serve", "--advertise", "nonsense"],
        &["frobnicate"],
        &[],
    ] {
        let output = run(line);
        assert_eq!(output.status.code(), Some(64), "{line:?}: {output:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{line:?}"
        );
    }
}

#[test]
fn failures_exit_with_1() {
    // Port 9 (discard) is not listening on a test machine.
    for line in [
        &["status", "--gateway", "http://127.0.0.1:9"][..],
        &["generate", "x", "--gateway", "http://127.0.0.1:9"],
        &["generate", "--prompt-file", "/nowhere/prompt.txt"],
    ] {
        let output = run(line);
        assert_eq!(output.status.code(), Some(1), "{line:?}: {output:?}");
        assert!(output.stdout.is_empty());
        assert!(text(&output.stderr).starts_with("specattn: "));
    }
}

/// The documented fields of `--json`.
fn check_shape(json: &Value) {
    for (object, names) in [
        (
            json,
            &["text", "token_ids", "finish_reason", "usage", "stats"][..],
        ),
        (&json["usage"], &["prompt_tokens", "completion_tokens"]),
        (
            &json["stats"],
            &[
                "target_forwards",
                "proposed_tokens",
                "accepted_tokens",
                "rollbacks",
                "kv_entries_read",
                "kv_entries_dense",
                "kv_kept_fraction",
                "mask_bytes",
                "ttft_seconds",
                "elapsed_seconds",
            ],
        ),
    ] {
        for name in names {
            assert!(!object[name].is_null(), "{name} is missing in {json}");
        }
    }
}

#[test]
fn generate_runs_the_bundled_pair() {
    let prompt = "It was a bright cold day in April";
    let json = run(&["generate", prompt, "--max-tokens", "24", "--json"]);
    assert_eq!(json.status.code(), Some(0), "{json:?}");
    assert_eq!(text(&json.stdout).lines().count(), 1);
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    check_shape(&report);
    assert_eq!(report["finish_reason"], "length");
    assert_eq!(report["usage"]["completion_tokens"], 24);
    assert_eq!(report["token_ids"].as_array().unwrap().len(), 24);
    assert!(report["stats"]["accepted_tokens"].as_u64().unwrap() > 0);
    assert!(report["stats"]["mask_bytes"].as_u64().unwrap() > 0);

    let streamed = run(&["generate", prompt, "-n", "24"]);
    let expected = report["text"].as_str().unwrap();
    assert_eq!(text(&streamed.stdout).trim_end_matches('\n'), expected);
    let closing = text(&streamed.stderr);
    assert_eq!(closing.lines().count(), 1, "{closing}");
    for part in [
        "tokens/s",
        "tokens per target forward",
        "acceptance",
        "KV kept",
        "bytes/round",
    ] {
        assert!(closing.contains(part), "{closing}");
    }

    let alone = run(&[
        "generate",
        prompt,
        "-n",
        "24",
        "--json",
        "--no-draft",
        "--mode",
        "dense",
        "-q",
    ]);
    assert!(alone.stderr.is_empty(), "{}", text(&alone.stderr));
    let alone: Value = serde_json::from_slice(&alone.stdout).unwrap();
    assert_eq!(alone["stats"]["proposed_tokens"], 0);
    assert_eq!(
        alone["token_ids"], report["token_ids"],
        "short prompts are read whole by every mode"
    );
}

#[test]
fn ctrl_c_cancels() {
    let line = [
        "generate",
        "Once",
        "--max-tokens",
        "100000",
        "--ignore-eos",
        "--threads",
        "1",
    ];
    let mut child = specattn(&line)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut first)
        .unwrap();
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("(cancelled)"));
}

/// `specattn serve` on a free port; killed when a test fails.
struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start() -> Self {
        Self::start_at("127.0.0.1:0", &[])
    }

    fn start_at(address: &str, arguments: &[&str]) -> Self {
        let mut child = specattn(&["serve", "--listen", address, "--log-level", "warn"])
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut url = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut url)
            .unwrap();
        let url = url.trim().to_owned();
        Self { child, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn serve_status_and_a_remote_generate_work_together() {
    let mut server = Server::start();
    assert!(
        server.url.starts_with("http://127.0.0.1:"),
        "{}",
        server.url
    );
    let folder = tempfile::tempdir().unwrap();
    let prompt = folder.path().join("prompt.txt");
    std::fs::write(&prompt, "The sea was calm that night, and").unwrap();
    let generate = |path: &Path| {
        let file = path.to_str().unwrap();
        run(&[
            "generate",
            "--prompt-file",
            file,
            "--gateway",
            &server.url,
            "--json",
            "-n",
            "8",
        ])
    };
    let output = generate(&prompt);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    check_shape(&serde_json::from_slice(&output.stdout).unwrap());

    let status = run(&["status", "--gateway", &server.url]);
    let table = text(&status.stdout);
    assert!(
        table.contains("verify") && table.contains("draft"),
        "{table}"
    );
    let status = run(&["status", "--gateway", &server.url, "--json"]);
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status["workers"].as_array().unwrap().len(), 2);
    assert!(status["sessions"].as_array().unwrap().is_empty());

    // What the gateway refuses is a failure with the status' name.
    std::fs::write(&prompt, "word ".repeat(20_000)).unwrap();
    let output = generate(&prompt);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("invalid_argument"),
        "{output:?}"
    );

    signal(&server.child, "TERM");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_generation_outlives_its_server() {
    const TOKENS: &str = "1500";
    let folder = tempfile::tempdir().unwrap();
    let log = ["--log-dir", folder.path().to_str().unwrap()];
    let server = Server::start_at("127.0.0.1:0", &log);
    let url = server.url.clone();
    let address = url.strip_prefix("http://").unwrap();
    let line = |more: &[&'static str]| {
        let mut line = vec![
            "generate",
            "Once upon a time",
            "--gateway",
            &url,
            "--ignore-eos",
        ];
        line.extend(["-n", TOKENS, "--mode", "dense", "--draft-length", "4"]);
        line.extend(more);
        specattn(&line)
    };
    let whole = line(&["--json", "-q"]).output().unwrap();
    let whole: Value = serde_json::from_slice(&whole.stdout).unwrap();
    let expected = whole["text"].as_str().unwrap();

    let mut child = line(&[])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = vec![0; 40];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut said)
        .unwrap();
    // kill -9, with its session in the middle.
    drop(server);
    let server = Server::start_at(address, &log);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    said.extend(&output.stdout);
    assert_eq!(text(&said).trim_end_matches('\n'), expected);

    // The first session is in the log: the same from any token on.
    let id = whole["session_id"].as_str().unwrap();
    let rest = run(&["resume", id, "--from", "1490", "--gateway", &url, "--json"]);
    let rest: Value = serde_json::from_slice(&rest.stdout).unwrap();
    check_shape(&rest);
    let tokens = whole["token_ids"].as_array().unwrap();
    assert_eq!(rest["token_ids"].as_array().unwrap()[..], tokens[1_490..]);
    assert!(expected.ends_with(rest["text"].as_str().unwrap()));
    let unknown = run(&["resume", &"0".repeat(32), "--gateway", &server.url]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("not_found"), "{unknown:?}");
}

#[test]
fn bench_serve_measures_loads_and_writes_its_files() {
    let folder = tempfile::tempdir().unwrap();
    let text_file = folder.path().join("book.txt");
    std::fs::write(&text_file, "The sea was calm that night. ".repeat(50)).unwrap();
    let out = folder.path().join("results");
    let output = run(&[
        "bench",
        "serve",
        "--concurrency",
        "1,3",
        "--duration",
        "2",
        "--warmup",
        "0.2",
        "--prompt-tokens",
        "uniform:20,60",
        "--output-tokens",
        "16",
        "--mode",
        "dense",
        "--goodput",
        "ttft:60000",
        "--text",
        text_file.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let loads = report["loads"].as_array().unwrap();
    assert_eq!(loads.len(), 2);
    for load in loads {
        assert!(load["completed"].as_u64().unwrap() > 0, "{load}");
        assert!(load["errors"].as_object().unwrap().is_empty(), "{load}");
        assert_eq!(load["good_share"], 1.0);
        assert!(load["tokens_per_second"].as_f64().unwrap() > 0.0);
        assert!(
            load["ttft_ms"]["p50"].as_f64().unwrap() <= load["e2e_ms"]["p50"].as_f64().unwrap()
        );
        assert_eq!(load["workers"].as_array().unwrap().len(), 2);
    }
    for file in ["serve.md", "serve.json", "serve.svg"] {
        assert!(
            std::fs::metadata(out.join(file)).unwrap().len() > 0,
            "{file}"
        );
    }

    // A gateway that runs already; an open loop.
    let server = Server::start();
    let output = run(&[
        "bench",
        "serve",
        "--gateway",
        &server.url,
        "--rates",
        "8",
        "--duration",
        "2",
        "--warmup",
        "0",
        "--prompt-tokens",
        "30",
        "--output-tokens",
        "4",
    ]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let table = text(&output.stdout);
    assert!(
        table.contains("clients of a gateway") && table.contains("| 8 |"),
        "{table}"
    );

    for line in [
        &["bench", "serve"][..],
        &["bench", "serve", "--rate", "0"],
        &["bench", "serve", "--rate", "1", "--concurrency", "1"],
        &["bench", "serve", "--rate", "1", "--prompt-tokens", "few"],
        &["bench", "serve", "--rate", "1", "--goodput", "ttft"],
    ] {
        assert_eq!(run(line).status.code(), Some(64), "{line:?}");
    }
}
