//! Where the services' binaries are, and that they are up to date.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Packages whose binaries are started.
const PACKAGES: [&str; 3] = ["specattn-gateway", "specattn-verify", "specattn-draft"];

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests
        .parent()
        .expect("the tests' crate is a folder of the workspace")
}

/// The binary `name`, of the same profile as the running program.
pub fn path(name: &str) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(build).join(name)
}

/// Builds what is not up to date, and gives the folder of the binaries.
fn build() -> PathBuf {
    // A test lies in target/<profile>/deps, a program in target/<profile>.
    let program = std::env::current_exe().expect("a program knows its own path");
    let mut folder = program.parent().expect("a program lies in a folder");
    if folder.ends_with("deps") {
        folder = folder.parent().expect("cargo puts deps into a folder");
    }
    let profile = folder
        .file_name()
        .and_then(|name| name.to_str())
        .expect("a profile has a name");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace()).args(["build", "--quiet"]);
    for package in PACKAGES {
        cargo.args(["--package", package]);
    }
    // The folder of the dev profile is called debug.
    if profile != "debug" {
        cargo.args(["--profile", profile]);
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "the services do not build");
    folder.to_owned()
}

/// Brings the binary `name` of `package` up to date beside the services' and gives its path.
pub fn program(package: &str, name: &str) -> PathBuf {
    let binary = path(name);
    let folder = binary.parent().and_then(|folder| folder.file_name());
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace());
    cargo.args(["build", "--quiet", "--package", package]);
    // The folder of the dev profile is called debug.
    match folder.and_then(|name| name.to_str()) {
        Some("debug") | None => {}
        Some(profile) => drop(cargo.args(["--profile", profile])),
    }
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "{name} does not build");
    binary
}
