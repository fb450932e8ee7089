//! Rewrites `src/generated/` and docs/api.md from the .proto files: `cargo run -p specattn-proto --example generate`.

#[path = "../tests/codegen/mod.rs"]
mod codegen;

fn main() -> anyhow::Result<()> {
    let fresh = tempfile::tempdir()?;
    codegen::generate(fresh.path())?;
    for (name, place) in codegen::GENERATED_FILES {
        std::fs::copy(fresh.path().join(name), codegen::committed(place))?;
        println!("wrote {place}");
    }
    Ok(())
}
