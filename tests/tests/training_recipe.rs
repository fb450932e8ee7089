//! The recipe in `models/train`, tiny and on a CPU: what it makes loads in the engine and says there what PyTorch says.
//!
//! The interpreter is `python3`, or what the environment variable `SPECATTN_TEST_PYTHON` names. Where it has no PyTorch,
//! numpy, safetensors and tokenizers the test says SKIPPED on stderr and passes.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use specattn_engine::{LoadOptions, LogitRows, Model, Step};
use specattn_tests::binaries::workspace;

/// The script's exit status for "a package is missing".
const SKIPPED: i32 = 77;

#[derive(Deserialize)]
struct Answer {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

#[derive(Deserialize)]
struct Answers {
    target: Answer,
    draft: Answer,
}

/// The engine's greedy continuation of `prompt`.
fn continuation(folder: &Path, prompt: &[u32], tokens: usize) -> Vec<u32> {
    let options = LoadOptions {
        kv_cache_bytes: 4 << 20,
        threads: 1,
        ..LoadOptions::default()
    };
    let mut model = Model::load(folder, &options, &mut |_, _| {}).unwrap();
    let mut sequence = model.new_sequence(prompt.len() + tokens).unwrap();
    let mut input = prompt.to_vec();
    let mut said = Vec::new();
    while said.len() < tokens {
        let step = Step {
            logits: LogitRows::Last,
            ..Step::new(&mut sequence, &input)
        };
        let logits = model.forward(&mut [step]).unwrap().remove(0).logits;
        let largest = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        said.push(largest.unwrap() as u32);
        input = vec![*said.last().unwrap()];
    }
    said
}

#[test]
fn a_tiny_pair_is_made_and_loads_in_the_engine() {
    let python = std::env::var_os("SPECATTN_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let out = tempfile::tempdir().unwrap();
    let script = workspace().join("tests/python/train_smoke.py");
    let ran = Command::new(&python).arg(script).arg(out.path()).output();
    let ran = match ran {
        Ok(ran) if ran.status.code() == Some(SKIPPED) => {
            let missing = String::from_utf8_lossy(&ran.stdout);
            return skip(&format!("{python:?}: {}", missing.trim()));
        }
        Ok(ran) => ran,
        Err(error) => return skip(&format!("{python:?} cannot be run: {error}")),
    };
    let (words, errors) = (&ran.stdout, &ran.stderr);
    assert!(
        ran.status.success(),
        "{}{}",
        String::from_utf8_lossy(words),
        String::from_utf8_lossy(errors)
    );
    let answers = std::fs::read(out.path().join("greedy.json")).unwrap();
    let answers: Answers = serde_json::from_slice(&answers).unwrap();
    for (role, answer) in [("target", answers.target), ("draft", answers.draft)] {
        let said = continuation(&out.path().join(role), &answer.prompt, answer.greedy.len());
        assert_eq!(said, answer.greedy, "{role}");
    }
}

/// Says so where it is seen: written past the test runner, which would keep the words of a passing test to itself.
fn skip(reason: &str) {
    writeln!(
        std::io::stderr(),
        "SKIPPED: the training recipe was not tested: {reason}"
    )
    .expect("stderr takes a line");
}
