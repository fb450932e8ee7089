//! Times whole forwards of a checkpoint on this machine against the bytes they must read.
//!
//! `cargo run --release -p specattn-bench --bin engine -- --model models/target`
//!
//! One row per context depth and number of tokens: the median over repeated forwards, the bytes of weights and KV
//! entries they read, and the rate that makes. The floor is that many bytes at the machine's own reading speed, which
//! the program measures first.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use specattn_engine::{DType, HeadLists, LoadOptions, LogitRows, Model, Sequence, Step};

/// Times forwards of a checkpoint.
#[derive(Debug, Parser)]
struct Args {
    /// Checkpoint folder.
    #[arg(long, default_value = "models/target")]
    model: PathBuf,
    /// Context depths to time at.
    #[arg(long, value_delimiter = ',', default_value = "0,1000,2048,6000,7168")]
    depths: Vec<usize>,
    /// Tokens per forward.
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,5,9")]
    tokens: Vec<usize>,
    /// Share of the cached positions that masked forwards read.
    #[arg(long, default_value_t = 0.216)]
    kept: f64,
    /// Prompt lengths for prefill rates.
    #[arg(long, value_delimiter = ',', default_value = "512,4096")]
    prompts: Vec<usize>,
    /// Tokens per prefill chunk.
    #[arg(long, default_value_t = 512)]
    chunk: usize,
    /// What KV entries are stored as: f32, bf16 or f16.
    #[arg(long, default_value = "f32")]
    kv_dtype: String,
    /// Threads; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Also time each forward with every layer's attention rows handed out.
    #[arg(long)]
    capture: bool,
    /// Forwards per figure.
    #[arg(long, default_value_t = 60)]
    repeats: usize,
}

/// The median and the least, in milliseconds.
fn median_and_least(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort();
    (
        times[times.len() / 2].as_secs_f64() * 1e3,
        times[0].as_secs_f64() * 1e3,
    )
}

/// The median, in milliseconds.
fn median(times: Vec<Duration>) -> f64 {
    median_and_least(times).0
}

/// Bytes per second of plain reading, both cores, from memory larger than the caches.
fn reading_speed() -> f64 {
    let data = vec![1u64; 64 << 20];
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let times = (0..5).map(|_| {
        let start = Instant::now();
        let sum: u64 = std::thread::scope(|scope| {
            let parts: Vec<_> = data
                .chunks(data.len() / threads)
                .map(|part| scope.spawn(|| part.iter().fold(0u64, |a, b| a.wrapping_add(*b))))
                .collect();
            parts
                .into_iter()
                .map(|p| p.join().expect("a summing thread ends"))
                .sum()
        });
        std::hint::black_box(sum);
        start.elapsed()
    });
    (data.len() * 8) as f64 / (median(times.collect()) * 1e-3)
}

/// Runs `sequence` up to `depth` tokens of filler text.
fn prefill(model: &mut Model, sequence: &mut Sequence, depth: usize, chunk: usize) -> Result<()> {
    let vocab = model.config().vocab_size as u32;
    sequence.truncate(depth);
    while sequence.len() < depth {
        let n = chunk.min(depth - sequence.len());
        let tokens: Vec<u32> = (0..n)
            .map(|i| ((sequence.len() + i) as u32 * 7919) % vocab)
            .collect();
        let step = Step::new(&mut *sequence, &tokens);
        model.forward(&mut [step])?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let args = Args::parse();
    let kv_dtype = match args.kv_dtype.as_str() {
        "f32" => DType::F32,
        "bf16" => DType::Bf16,
        "f16" => DType::F16,
        other => anyhow::bail!("unknown KV type {other}"),
    };
    let options = LoadOptions {
        threads: args.threads,
        kv_dtype: Some(kv_dtype),
        ..LoadOptions::default()
    };
    let mut model =
        Model::load(&args.model, &options, &mut |_, _| {}).context("loading the model")?;
    let c = model.config().clone();
    let speed = reading_speed();
    let weights: u64 = std::fs::read_dir(&args.model)?
        .filter_map(|e| e.ok())
        .filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"))
        .map(|e| e.metadata().map_or(0, |m| m.len()))
        .sum();
    let entry = (2 * c.head_dim * kv_dtype.bytes()) as f64;
    println!(
        "{}: {:.1} MB of weights, reading speed {:.1} GB/s, KV {}\n",
        c.name,
        weights as f64 / 1e6,
        speed / 1e9,
        args.kv_dtype
    );
    println!("| depth | tokens | attention | ms | least ms | MB read | floor ms | ms ÷ floor |");
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut sequence = model.new_sequence(c.max_context)?;
    let layers: Vec<usize> = (0..c.num_layers).collect();
    for &depth in &args.depths {
        prefill(&mut model, &mut sequence, depth, args.chunk)?;
        let kept = (0..depth)
            .filter(|&p| {
                ((p as u32).wrapping_mul(2_654_435_761) >> 8) as f64 / (1u32 << 24) as f64
                    <= args.kept
            })
            .collect();
        let lists = HeadLists {
            lists: vec![kept],
            of_head: vec![0; c.num_layers * c.num_kv_heads],
        };
        for &n in &args.tokens {
            let variants: &[(&str, Option<&HeadLists>, &[usize])] = if args.capture {
                &[
                    ("dense", None, &[]),
                    ("captured", None, &layers),
                    ("masked", Some(&lists), &[]),
                ]
            } else {
                &[("dense", None, &[]), ("masked", Some(&lists), &[])]
            };
            for &(name, lists, capture) in variants {
                if depth == 0 && lists.is_some() {
                    continue;
                }
                let tokens: Vec<u32> = (0..n as u32).map(|i| i * 31 + 5).collect();
                let mut times = Vec::new();
                let mut reads = 0;
                for repeat in 0..args.repeats + 5 {
                    sequence.truncate(depth);
                    let step = Step {
                        lists,
                        logits: LogitRows::All,
                        capture,
                        ..Step::new(&mut sequence, &tokens)
                    };
                    let start = Instant::now();
                    let output = model.forward(&mut [step])?;
                    if repeat >= 5 {
                        times.push(start.elapsed());
                    }
                    reads = output[0].kv.read;
                }
                let bytes = weights as f64 + reads as f64 * entry;
                let ((ms, least), floor) = (median_and_least(times), bytes / speed * 1e3);
                println!(
                    "| {depth} | {n} | {name} | {ms:.3} | {least:.3} | {:.1} | {floor:.3} | {:.2} |",
                    bytes / 1e6,
                    ms / floor
                );
            }
        }
    }
    println!("\n| prompt | ms | tokens/s |\n| --- | --- | --- |");
    for &prompt in &args.prompts {
        let mut times = Vec::new();
        for _ in 0..5 {
            sequence.truncate(0);
            let start = Instant::now();
            prefill(&mut model, &mut sequence, prompt, args.chunk)?;
            times.push(start.elapsed());
        }
        let ms = median(times);
        println!("| {prompt} | {ms:.1} | {:.0} |", prompt as f64 / ms * 1e3);
    }
    Ok(())
}
