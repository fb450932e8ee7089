//! The example clients do what their README says: each streams a completion from `specattn serve`, and shows its API key.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use specattn_tests::binaries::{self, workspace};
use specattn_tests::python;
use tempfile::TempDir;

/// A prompt that JSON must quote.
const PROMPT: &str = "The captain said: \"We sail\\at\tdawn\",\nand";

/// `specattn serve` with a key for clients.
struct Served {
    child: Child,
    url: String,
    key: String,
    _folder: TempDir,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys = folder.path().join("api-keys.json");
        let specattn = python::specattn();
        let made = Command::new(&specattn)
            .args(["key", "new", "example", "--api-keys"])
            .arg(&keys)
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let mut child = Command::new(&specattn)
            .args(["serve", "--listen", "127.0.0.1:0", "--quiet", "--api-keys"])
            .arg(&keys)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says where it is once it takes requests.
        let mut url = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut url).unwrap();
        assert!(url.starts_with("http://"), "{url}");
        Self {
            child,
            url: url.trim().to_owned(),
            key: String::from_utf8(made.stdout).unwrap().trim().to_owned(),
            _folder: folder,
        }
    }

    /// Runs an example to its end; what it wrote, text and closing line.
    fn run(&self, mut example: Command) -> (String, String) {
        let output = example
            .arg(PROMPT)
            .current_dir(workspace())
            .env("SPECATTN_GATEWAY", &self.url)
            .env("SPECATTN_API_KEY", &self.key)
            .output()
            .unwrap();
        assert!(output.status.success(), "{example:?}: {output:?}");
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    }

    /// The same, when whoever has no key is refused.
    fn refuses_without_key(&self, mut example: Command) {
        let output = example
            .arg(PROMPT)
            .current_dir(workspace())
            .env("SPECATTN_GATEWAY", &self.url)
            .env_remove("SPECATTN_API_KEY")
            .output()
            .unwrap();
        assert!(!output.status.success(), "{example:?}: {output:?}");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program that runs `file`; `None`, said where it is seen, where `check` says that something is missing.
fn example(program: impl Into<PathBuf>, check: &[&str], file: &str) -> Option<Command> {
    let program = program.into();
    let there = Command::new(&program).args(check).output();
    if !there.is_ok_and(|output| output.status.success()) {
        let text = format!("SKIPPED: examples/{file} did not run: {program:?} {check:?} fails");
        writeln!(std::io::stderr(), "{text}").expect("stderr takes a line");
        return None;
    }
    let mut command = Command::new(program);
    command.arg(workspace().join("examples").join(file));
    Some(command)
}

fn python_example(packages: &str, file: &str) -> Option<Command> {
    let python = std::env::var_os("SPECATTN_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    example(python, &["-c", &format!("import {packages}")], file)
}

#[test]
fn every_example_streams_a_completion() {
    let served = Served::start();
    let mut texts = Vec::new();

    let rust = || Command::new(binaries::program("specattn-example", "specattn-example"));
    let (text, closing) = served.run(rust());
    assert!(closing.contains("64 tokens"), "{closing}");
    served.refuses_without_key(rust());
    texts.push(text);

    if let Some(python) = python_example("grpc, grpc_tools", "grpc_client.py") {
        let (text, closing) = served.run(python);
        assert!(closing.contains("64 tokens"), "{closing}");
        texts.push(text);
    }
    if let Some(python) = python_example("openai", "openai_client.py") {
        let (text, closing) = served.run(python);
        assert!(closing.contains("64 tokens"), "{closing}");
        texts.push(text);
    }
    for text in texts {
        assert!(text.trim().len() > 60, "{text:?}");
    }

    if let Some(mut bash) = example("curl", &["--version"], "curl.sh") {
        let script = bash.get_args().next().unwrap().to_owned();
        bash = Command::new("bash");
        bash.arg(script);
        let (events, _) = served.run(bash);
        let data = events
            .lines()
            .filter_map(|line| line.strip_prefix("data: "));
        let data: Vec<&str> = data.collect();
        assert_eq!(data.last(), Some(&"[DONE]"), "{events}");
        let chunks = data[..data.len() - 1].iter();
        let mut text = String::new();
        for chunk in chunks {
            let chunk: serde_json::Value = serde_json::from_str(chunk).unwrap();
            text += chunk["choices"][0]["text"].as_str().unwrap_or_default();
        }
        assert!(text.trim().len() > 60, "{events}");
    }
}
