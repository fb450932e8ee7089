//! Checks the GPU kernels against an oracle and times them against floors, printing Markdown.
//!
//! `cargo run --release -p specattn-bench --bin gpu -- check time`

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use specattn_bench::gpu::forwards::{self, ForwardCase};
use specattn_bench::gpu::graphs::{Launching, name_of};
use specattn_bench::gpu::{
    check_attention, check_company, check_graphs, check_hand_outs, check_linear, check_selection,
    check_sharing, draft_steps, listed_steps, load, pair, tensor_parallel, time_kernels, timer,
};
use specattn_engine::backend::AttentionShape;
use specattn_engine::cuda::{CudaBackend, Device, device_count, keep_multicast_off};
use specattn_engine::{DType, DeviceChoice};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Attention, products, norm and selection against oracles.
    Check,
    /// The same kernels' times.
    Time,
    /// A small part of `check`, for compute-sanitizer.
    Sanitize,
    /// Greedy text of the bundled target against the CPU's.
    Pair,
    /// Whole forwards of public models' shapes with random weights.
    Forwards,
    /// Draft steps with and without capture, dense and by lists.
    DraftSteps,
    /// Loading a checkpoint.
    Load,
    /// A model split over the GPUs that `--split` lists against the same model on the first of them.
    TensorParallel,
}

/// Kernels that `check`, `sanitize` and `time` can be told to look at alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kernels {
    /// Attention of few rows a sequence; `check` has prefill with it.
    Attention,
    /// Attention of prompts.
    Prefill,
    /// Top-p selection.
    TopP,
    /// Products of few rows.
    Products,
    /// Whole models: what passes hand out, in whose company, on a shared device, as graphs; of `check` alone.
    Models,
}

/// Checks and times the GPU kernels.
#[derive(Debug, Parser)]
struct Args {
    /// What to do, in order.
    #[arg(required = true)]
    parts: Vec<Part>,
    /// What of `check`, `sanitize` and `time`, if not all.
    #[arg(long, value_enum)]
    only: Option<Kernels>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// The GPUs that a model is split over.
    #[arg(long, default_value = "cuda:0,1")]
    split: DeviceChoice,
    /// Folder for compiled kernels.
    #[arg(long)]
    kernel_cache: Option<PathBuf>,
    /// Keys per unit of decode attention, in place of the default.
    #[arg(long)]
    chunk: Option<usize>,
    /// How passes of `pair`, `forwards` and `draft-steps` are launched.
    #[arg(long, value_enum, default_value_t = Launching::Both)]
    launching: Launching,
    /// The repository's root.
    #[arg(long, default_value = ".")]
    root: PathBuf,
}

fn main() -> Result<()> {
    keep_multicast_off();
    let args = Args::parse();
    if device_count() == 0 {
        println!("SKIPPED: no GPU here");
        return Ok(());
    }
    let device = Device::shared(args.gpu, args.kernel_cache.clone())?;
    println!("{}\n", device.name());
    let mut bf16 = CudaBackend::new(device.clone(), DType::Bf16)?;
    let f16 = CudaBackend::new(device.clone(), DType::F16)?;
    if let Some(keys) = args.chunk {
        bf16.set_decode_chunk(keys);
    }
    let choice = &DeviceChoice::gpu(args.gpu);
    let wanted = |kernels: &[Kernels]| args.only.is_none_or(|only| kernels.contains(&only));
    let mut fine = true;
    for part in args.parts {
        device.use_graphs(true);
        match part {
            Part::Check => {
                if wanted(&[Kernels::TopP]) {
                    fine &= check_selection::check(&bf16)?;
                }
                for (backend, dtype) in [(&bf16, DType::Bf16), (&f16, DType::F16)] {
                    if wanted(&[Kernels::Products]) {
                        fine &= check_linear::check(backend, dtype)?;
                    }
                    if wanted(&[Kernels::Attention, Kernels::Prefill]) {
                        fine &= check_attention::check(backend, dtype)?;
                    }
                }
                if wanted(&[Kernels::Models]) {
                    fine &= check_hand_outs::check(&args.root, choice)?;
                    fine &= check_company::check(&args.root, choice)?;
                    fine &= check_sharing::check(&args.root, choice)?;
                    fine &= check_graphs::check(&args.root, &device)?;
                }
                println!(
                    "{}\n",
                    if fine {
                        "all checks passed"
                    } else {
                        "CHECKS FAILED"
                    }
                );
            }
            Part::Sanitize => {
                if wanted(&[Kernels::TopP]) {
                    fine &= check_selection::check_length(&bf16, 1000)?;
                }
                if wanted(&[Kernels::Products]) {
                    // The longer one has more tiles than a ring has stages.
                    for inputs in [72, 2056] {
                        fine &=
                            check_linear::check_shape(&bf16, DType::Bf16, inputs, [100, 36, 20])?;
                    }
                }
                if wanted(&[Kernels::Attention, Kernels::Prefill]) {
                    // Two tiles of rows where a sequence has more than four tokens.
                    let shape = AttentionShape {
                        num_heads: 8,
                        num_kv_heads: 2,
                        head_dim: 64,
                    };
                    fine &= check_attention::check_shape(&bf16, DType::Bf16, shape)?;
                }
            }
            Part::Pair => {
                let reference = args.root.join("tests/fixtures/greedy_bundled.json");
                for graphs in args.launching.ways() {
                    device.use_graphs(graphs);
                    println!("Launched {}:", name_of(graphs));
                    fine &= pair::compare(&args.root.join("models/target"), &reference, &device)?;
                }
            }
            Part::Forwards => {
                let bandwidth = timer::copy_bandwidth(&device)?;
                println!(
                    "Copy: {:.2} TB/s, bytes read and written.\n",
                    bandwidth / 1e12
                );
                let configs = args.root.join("bench/gpu/configs");
                let verify: Vec<ForwardCase> = [1, 8]
                    .into_iter()
                    .flat_map(|batch| {
                        [4096, 16_384, 32_768].map(|context| ForwardCase {
                            batch,
                            context,
                            tokens: 5,
                        })
                    })
                    .chain(
                        [(1, 1), (32, 1), (32, 5)].map(|(batch, tokens)| ForwardCase {
                            batch,
                            context: 8192,
                            tokens,
                        }),
                    )
                    .collect();
                for name in ["llama-3-8b", "llama-2-7b"] {
                    let config = configs.join(format!("{name}.json"));
                    forwards::table(&config, &device, (&verify, args.launching), bandwidth)?;
                }
            }
            Part::DraftSteps => {
                let config = args.root.join("bench/gpu/configs/tinyllama-1.1b.json");
                let contexts = [4096, 16_384, 32_000];
                draft_steps::table(&config, &device, &contexts, args.launching)?;
                listed_steps::table(&config, choice, &contexts[..2])?;
            }
            Part::Load => {
                let config = args.root.join("bench/gpu/configs/tinyllama-1.1b.json");
                load::report(&config, &device)?;
            }
            Part::TensorParallel => {
                fine &= tensor_parallel::report(&args.root, &args.split)?;
            }
            Part::Time => {
                // Kernels are timed, and captured, one by one.
                device.use_graphs(false);
                let bandwidth = timer::copy_bandwidth(&device)?;
                println!(
                    "Copy: {:.2} TB/s, bytes read and written.\n",
                    bandwidth / 1e12
                );
                if wanted(&[Kernels::Attention]) {
                    time_kernels::verification(&bf16, DType::Bf16, 5, bandwidth)?;
                    time_kernels::verification(&bf16, DType::Bf16, 1, bandwidth)?;
                }
                if wanted(&[Kernels::TopP]) {
                    time_kernels::top_p(&bf16, bandwidth)?;
                }
                if wanted(&[Kernels::Products]) {
                    time_kernels::products(&bf16, bandwidth)?;
                }
                if wanted(&[Kernels::Prefill]) {
                    time_kernels::prefill(&bf16, DType::Bf16)?;
                }
            }
        }
    }
    if !fine {
        bail!("a kernel is wrong");
    }
    Ok(())
}
