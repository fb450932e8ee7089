//! Times forwards over many sequences at once: what a batch gains over one sequence alone.
//!
//! `cargo run --release -p specattn-bench --bin batch -- --model models/target`
//!
//! One row per context depth and batch: the median over repeated forwards, tokens per second, how many times one
//! sequence's rate that is, and the rates of arithmetic (two operations per weight and row) and of KV bytes that it makes.
//! The two limits show themselves: at small depths arithmetic stops growing, at large ones KV bytes do.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use specattn_engine::{LoadOptions, LogitRows, Model, Sequence, Step};

/// Times forwards over many sequences.
#[derive(Debug, Parser)]
struct Args {
    /// Checkpoint folder.
    #[arg(long, default_value = "models/target")]
    model: PathBuf,
    /// Context depths of all sequences.
    #[arg(long, value_delimiter = ',', default_value = "100,1000")]
    depths: Vec<usize>,
    /// Sequences per forward.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128")]
    batches: Vec<usize>,
    /// Tokens of each sequence per forward.
    #[arg(long, default_value_t = 1)]
    tokens: usize,
    /// Forwards per figure.
    #[arg(long, default_value_t = 40)]
    repeats: usize,
}

/// Prefills every sequence to `depth` tokens of filler text.
fn prefill(model: &mut Model, sequences: &mut [Sequence], depth: usize) -> Result<()> {
    let vocab = model.config().vocab_size as u32;
    for sequence in sequences {
        sequence.truncate(0);
        while sequence.len() < depth {
            let n = 256.min(depth - sequence.len());
            let filler = |i| ((sequence.len() + i) as u32 * 7919) % vocab;
            let tokens: Vec<u32> = (0..n).map(filler).collect();
            let step = step(sequence, &tokens, LogitRows::None);
            model.forward(&mut [step])?;
        }
    }
    Ok(())
}

fn step<'a>(sequence: &'a mut Sequence, tokens: &'a [u32], logits: LogitRows) -> Step<'a> {
    Step {
        logits,
        ..Step::new(sequence, tokens)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let most = args.batches.iter().copied().max().unwrap_or(1);
    let room = args.depths.iter().copied().max().unwrap_or(0) + args.tokens;
    let options = LoadOptions {
        kv_cache_bytes: 3 << 30,
        ..LoadOptions::default()
    };
    let mut model =
        Model::load(&args.model, &options, &mut |_, _| {}).context("loading the model")?;
    let c = model.config().clone();
    let per_layer = c.hidden_size * (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        + 3 * c.hidden_size * c.intermediate_size;
    let weights = c.num_layers * per_layer + c.vocab_size * c.hidden_size;
    let mut sequences: Vec<Sequence> = (0..most)
        .map(|_| model.new_sequence(room))
        .collect::<Result<_, _>>()?;
    println!("| depth | sequences | ms | tokens/s | × one | GFLOP/s of weights | GB/s of KV |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for &depth in &args.depths {
        prefill(&mut model, &mut sequences, depth)?;
        let mut one = None;
        for &batch in &args.batches {
            let tokens: Vec<u32> = (0..args.tokens as u32).map(|i| i * 31 + 5).collect();
            let mut times = Vec::new();
            let mut read = 0;
            for repeat in 0..args.repeats + 3 {
                for sequence in &mut sequences[..batch] {
                    sequence.truncate(depth);
                }
                let mut steps: Vec<Step<'_>> = sequences[..batch]
                    .iter_mut()
                    .map(|sequence| step(sequence, &tokens, LogitRows::Verify))
                    .collect();
                let start = Instant::now();
                let outputs = model.forward(&mut steps)?;
                if repeat >= 3 {
                    times.push(start.elapsed());
                }
                read = outputs.iter().map(|o| o.kv.read).sum();
            }
            times.sort();
            let seconds = times[times.len() / 2].as_secs_f64();
            let rate = (batch * args.tokens) as f64 / seconds;
            println!(
                "| {depth} | {batch} | {:.3} | {rate:.0} | {:.2} | {:.0} | {:.1} |",
                seconds * 1e3,
                rate / *one.get_or_insert(rate),
                rate * 2.0 * weights as f64 / 1e9,
                (read as usize * model.kv_entry_bytes()) as f64 / seconds / 1e9,
            );
        }
    }
    Ok(())
}
