//! Test scripts in Python against the project's binaries, where the interpreter has the packages they need.
//!
//! The interpreter is `python3`, or what the environment variable `SPECATTN_TEST_PYTHON` names.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use crate::binaries::{self, workspace};

/// The script's exit status for "a package is missing".
const SKIPPED: i32 = 77;

/// Runs `tests/python/SCRIPT --binary specattn`, which must pass. Where the interpreter or one of the `packages` is missing,
/// says SKIPPED on stderr and returns.
pub fn run_script(script: &str, packages: &[&str]) {
    let python = std::env::var_os("SPECATTN_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let imports = format!("import {}", packages.join(", "));
    match Command::new(&python).args(["-c", &imports]).output() {
        Ok(output) if output.status.success() => {}
        Ok(_) => {
            return skip(
                script,
                &format!("{python:?} has not all of {}", packages.join(", ")),
            );
        }
        Err(error) => return skip(script, &format!("{python:?} cannot be run: {error}")),
    }
    let status = Command::new(&python)
        .arg(workspace().join("tests/python").join(script))
        .arg("--binary")
        .arg(specattn())
        .status()
        .expect("the interpreter ran a moment ago");
    if status.code() == Some(SKIPPED) {
        return skip(script, "a Python package is missing");
    }
    assert!(status.success(), "{script} ended with {status}");
}

/// Says so where it is seen: written past the test runner, which would keep the words of a passing test to itself.
fn skip(script: &str, reason: &str) {
    writeln!(std::io::stderr(), "SKIPPED: {script} did not run: {reason}")
        .expect("stderr takes a line");
}

/// Brings `specattn` up to date beside the services' binaries and gives its path.
pub fn specattn() -> PathBuf {
    binaries::program("specattn-cli", "specattn")
}
