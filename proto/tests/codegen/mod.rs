//! Turns `specattn/v1/*.proto` into the files under `src/generated/` and docs/api.md, with a compiler written in Rust: no
//! protoc.
//!
//! Shared by the `generate` example, which writes the files, and the `generated` test, which compares them.

mod reference;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The package's files, in a fixed order so that the output is stable.
const PROTO_FILES: [&str; 6] = [
    "specattn/v1/common.proto",
    "specattn/v1/draft.proto",
    "specattn/v1/generation.proto",
    "specattn/v1/log.proto",
    "specattn/v1/registry.proto",
    "specattn/v1/verify.proto",
];

/// The files that [`generate`] writes into its folder, and where each is committed, from the crate's folder.
pub(crate) const GENERATED_FILES: [(&str, &str); 3] = [
    ("specattn.v1.rs", "src/generated/specattn.v1.rs"),
    ("specattn.v1.bin", "src/generated/specattn.v1.bin"),
    ("api.md", "../docs/api.md"),
];

/// The crate's folder.
fn crate_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Where a generated file is committed.
pub(crate) fn committed(place: &str) -> PathBuf {
    crate_dir().join(place)
}

/// Writes [`GENERATED_FILES`] into `out_dir`.
pub(crate) fn generate(out_dir: &Path) -> Result<()> {
    let compile = |with_source: bool| -> Result<protox::Compiler> {
        let mut compiler = protox::Compiler::new([crate_dir()])?;
        compiler.include_imports(true);
        compiler.include_source_info(with_source);
        compiler.open_files(PROTO_FILES)?;
        Ok(compiler)
    };
    // Comments become documentation of the Rust types; the descriptor set that servers carry does without them.
    let commented = compile(true)?.file_descriptor_set();
    let reference = reference::page(&commented).context("writing the reference")?;
    std::fs::write(out_dir.join(GENERATED_FILES[2].0), reference)
        .context("writing the reference")?;
    let descriptors = compile(false)?.encode_file_descriptor_set();
    tonic_prost_build::configure()
        .out_dir(out_dir)
        .emit_rerun_if_changed(false)
        .btree_map(".")
        .compile_fds(commented)
        .context("generating Rust types")?;
    std::fs::write(out_dir.join(GENERATED_FILES[1].0), descriptors)
        .context("writing the descriptor set")
}
