//! Checks the GPU kernels against an oracle and times them against floors, printing Markdown.
//!
//! `cargo run --release -p specattn-bench --bin gpu -- check time`

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use specattn_bench::gpu::{check_attention, check_linear, check_selection, time_kernels, timer};
use specattn_engine::DType;
use specattn_engine::cuda::{CudaBackend, Device, device_count};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Attention, products, norm and selection against oracles.
    Check,
    /// The same kernels' times.
    Time,
    /// A small part of `check`, for compute-sanitizer.
    Sanitize,
}

/// Checks and times the GPU kernels.
#[derive(Debug, Parser)]
struct Args {
    /// What to do, in order.
    #[arg(required = true)]
    parts: Vec<Part>,
    /// Which GPU.
    #[arg(long, default_value_t = 0)]
    gpu: usize,
    /// Folder for compiled kernels.
    #[arg(long)]
    kernel_cache: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if device_count() == 0 {
        println!("SKIPPED: no GPU here");
        return Ok(());
    }
    let device = Device::open(args.gpu, args.kernel_cache)?;
    println!("{}\n", device.name());
    let bf16 = CudaBackend::new(device.clone(), DType::Bf16)?;
    let f16 = CudaBackend::new(device.clone(), DType::F16)?;
    let mut fine = true;
    for part in args.parts {
        match part {
            Part::Check => {
                fine &= check_selection::check(&bf16)?;
                for (backend, dtype) in [(&bf16, DType::Bf16), (&f16, DType::F16)] {
                    fine &= check_linear::check(backend, dtype)?;
                    fine &= check_attention::check(backend, dtype)?;
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
                fine &= check_selection::check_length(&bf16, 1000)?;
                fine &= check_linear::check_shape(&bf16, DType::Bf16, 72, [100, 36, 20])?;
                fine &= check_attention::check_head_dim(&bf16, DType::Bf16, 64)?;
            }
            Part::Time => {
                let bandwidth = timer::copy_bandwidth(&device)?;
                println!(
                    "Copy: {:.2} TB/s, bytes read and written.\n",
                    bandwidth / 1e12
                );
                time_kernels::verification(&bf16, DType::Bf16, 5, bandwidth)?;
                time_kernels::verification(&bf16, DType::Bf16, 1, bandwidth)?;
                time_kernels::top_p(&bf16, bandwidth)?;
                time_kernels::products(&bf16, bandwidth)?;
                time_kernels::prefill(&bf16, DType::Bf16)?;
            }
        }
    }
    if !fine {
        bail!("a kernel is wrong");
    }
    Ok(())
}
