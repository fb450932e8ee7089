//! Rewrites `src/generated/` from the .proto files: `cargo run -p specattn-proto --example generate`.

#[path = "../tests/codegen/mod.rs"]
mod codegen;

fn main() -> anyhow::Result<()> {
    codegen::generate(&codegen::generated_dir())?;
    for name in codegen::GENERATED_FILES {
        println!("wrote src/generated/{name}");
    }
    Ok(())
}
