//! A client in another language, written from the .proto files alone: `tests/python/client_test.py` against a running
//! `specattn serve`.
//!
//! The interpreter is `python3`, or what the environment variable `SPECATTN_TEST_PYTHON` names. Where it has no grpcio
//! and grpcio-tools the test says SKIPPED on stderr and passes.

use std::io::Write;
use std::process::Command;

use specattn_tests::binaries::{self, workspace};

/// The script's exit status for "a package is missing".
const SKIPPED: i32 = 77;

/// Brings `specattn` up to date beside the services' binaries and gives its path.
fn specattn() -> std::path::PathBuf {
    let binary = binaries::path("specattn");
    let folder = binary.parent().and_then(|folder| folder.file_name());
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace());
    cargo.args(["build", "--quiet", "--package", "specattn-cli"]);
    // The folder of the dev profile is called debug.
    match folder.and_then(|name| name.to_str()) {
        Some("debug") | None => {}
        Some(profile) => drop(cargo.args(["--profile", profile])),
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "specattn does not build");
    binary
}

/// Says so where it is seen: written past the test runner, which would keep the words of a passing test to itself.
fn skip(reason: &str) {
    writeln!(
        std::io::stderr(),
        "SKIPPED: the Python client was not tested: {reason}"
    )
    .expect("stderr takes a line");
}

#[test]
fn a_client_written_from_the_proto_files_alone() {
    let python = std::env::var_os("SPECATTN_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let script = workspace().join("tests/python/client_test.py");
    let probe = Command::new(&python)
        .args(["-c", "import grpc, grpc_tools"])
        .output();
    match probe {
        Ok(output) if output.status.success() => {}
        Ok(_) => return skip(&format!("{python:?} has no grpcio and grpcio-tools")),
        Err(error) => return skip(&format!("{python:?} cannot be run: {error}")),
    }
    let status = Command::new(&python)
        .arg(script)
        .arg("--binary")
        .arg(specattn())
        .status()
        .expect("the interpreter ran a moment ago");
    if status.code() == Some(SKIPPED) {
        return skip("a Python package is missing");
    }
    assert!(
        status.success(),
        "the Python client test ended with {status}"
    );
}
