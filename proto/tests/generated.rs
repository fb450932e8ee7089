//! The committed generated files must be what the .proto files yield.

mod codegen;

#[test]
fn committed_files_match_the_protos() {
    let fresh = tempfile::tempdir().expect("a temporary folder");
    codegen::generate(fresh.path()).expect("the .proto files compile");
    for (name, place) in codegen::GENERATED_FILES {
        let want = std::fs::read(fresh.path().join(name)).expect("generated just now");
        let have = std::fs::read(codegen::committed(place)).unwrap_or_default();
        assert!(
            want == have,
            "{place} is out of date: run `cargo run -p specattn-proto --example generate`"
        );
    }
}
