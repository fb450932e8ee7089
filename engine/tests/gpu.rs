//! What a caller meets on a machine without the GPU it asks for. Kernels are checked by `specattn-bench`'s `gpu` program.
#![cfg(feature = "cuda")]

use std::path::PathBuf;

use specattn_engine::cuda::device_count;
use specattn_engine::{DeviceChoice, EngineError, LoadOptions, Model};

#[test]
fn a_missing_gpu_is_an_ordinary_error() {
    let folder =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoints/llama2");
    let options = LoadOptions {
        device: DeviceChoice::gpu(device_count()),
        kv_cache_bytes: 1 << 20,
        ..LoadOptions::default()
    };
    let error =
        Model::load(&folder, &options, &mut |_, _| {}).expect_err("one GPU more than there are");
    assert!(matches!(error, EngineError::Cuda(_)), "{error}");
    assert!(error.label().starts_with("cuda_"), "{}", error.label());
    let text = error.to_string();
    assert!(
        text.contains("is not installed") || text.contains("no GPU number"),
        "{text}"
    );
}

#[test]
fn auto_falls_back_to_the_cpu() {
    if device_count() > 0 {
        eprintln!("SKIPPED: this machine has a GPU");
        return;
    }
    assert_eq!(DeviceChoice::Auto.decided(), DeviceChoice::Cpu);
}
