//! Compares mask codecs on masks recorded from a draft model and prints the table of `bench/codec.md`.
//!
//! `cargo run --release -p specattn-bench --bin codec -- --record BOOK.txt`

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use specattn_bench::codec::{Recording, Session, candidates, measure, recorder};
use specattn_engine::{LoadOptions, Model};

/// Compares mask codecs: bytes per round against the order-0 entropy of what changed, and times.
#[derive(Debug, Parser)]
struct Args {
    /// A book to record masks on; repeat for more sessions.
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "masks",
        conflicts_with = "masks"
    )]
    record: Vec<PathBuf>,
    /// Masks recorded earlier.
    #[arg(long, value_name = "FILE")]
    masks: Option<PathBuf>,
    /// Where to keep what is recorded.
    #[arg(long, value_name = "FILE", requires = "record")]
    save: Option<PathBuf>,
    /// The draft's checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/draft")]
    draft: PathBuf,
    /// Probability masses to select by when recording, in thousandths.
    #[arg(long, value_delimiter = ',', default_value = "800,900,950")]
    p: Vec<u32>,
    /// Passes over the masks; times are the median pass's.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let recording = match &args.masks {
        Some(path) => Recording::load(path)?,
        None => record(&args)?,
    };
    print_table(&recording, args.repeats as usize)
}

fn record(args: &Args) -> Result<Recording> {
    ensure!(
        args.p.iter().all(|p| (1..=1_000).contains(p)),
        "p is in thousandths, 1 to 1,000"
    );
    let options = LoadOptions::default();
    let mut model =
        Model::load(&args.draft, &options, &mut |_, _| {}).context("loading the draft")?;
    let tokenizer = args.draft.join("tokenizer.json");
    let mut recording = Recording::default();
    let style = ProgressStyle::with_template("recording {wide_bar} {pos}/{len} books")?;
    let progress = ProgressBar::new(args.record.len() as u64).with_style(style);
    for (session, text) in args.record.iter().enumerate() {
        recorder::record(
            &mut model,
            &tokenizer,
            text,
            &args.p,
            session as u32,
            &mut recording,
        )?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    if let Some(path) = &args.save {
        recording.save(path)?;
    }
    Ok(recording)
}

fn print_table(recording: &Recording, repeats: usize) -> Result<()> {
    println!(
        "| p | codec | bytes / round | ÷ order-0 entropy | encode µs | decode µs | both, context ≥ 7,680, µs |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (&p, sessions) in &recording.by_p {
        let sessions: Vec<&Session> = sessions.values().collect();
        for (name, open) in candidates() {
            let f = measure::measure(open, &sessions, repeats).with_context(|| name)?;
            let p = f64::from(p) / 1e3;
            println!(
                "| {p} | {name} | {:.0} | {:.2} | {:.1} | {:.1} | {:.1} |",
                f.bytes, f.of_entropy, f.encode_us, f.decode_us, f.long_us
            );
        }
    }
    Ok(())
}
