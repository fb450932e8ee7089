//! Times what the host does for sessions between the forwards of a round, part by part: one session after another, and shared out
//! among the engine's threads as a batch's sessions are.
//!
//! `cargo run --release -p specattn-bench --bin host -- --sessions 32`

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use specattn_bench::host::{Part, Seat, Shape};
use specattn_engine::Crew;

/// Times the host's work between forwards, without a model. The shapes are Llama-3-8B's and Llama-3.2-1B's.
#[derive(Debug, Parser)]
struct Args {
    /// Sessions of a batch.
    #[arg(long, default_value_t = 32)]
    sessions: usize,
    /// Tokens of context.
    #[arg(long, default_value_t = 8_000)]
    context: usize,
    /// Share of positions that masks keep.
    #[arg(long, default_value_t = 0.2)]
    kept: f64,
    /// Share of positions that the draft keeps for itself.
    #[arg(long, default_value_t = 0.8)]
    own_kept: f64,
    /// Chance that a position's bit stays as it was from round to round.
    #[arg(long, default_value_t = 0.5)]
    repeat: f64,
    /// Rounds to take the median of.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Threads of the engine; 0 takes all cores.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

/// Rounds that fill the codec's memory before any counts.
const WARM_UP: usize = 8;

fn main() -> Result<()> {
    let args = Args::parse();
    let shape = Shape {
        draft: (16, 32, 8),
        target: (32, 8),
        vocab_size: 128_256,
        context: args.context,
        draft_length: 4,
        kept: args.kept,
        own_kept: args.own_kept,
        repeat: args.repeat,
    };
    let mut rng = StdRng::seed_from_u64(7);
    let logits: Arc<[f32]> = (0..shape.vocab_size)
        .map(|_| rng.random_range(-4.0..4.0))
        .collect();
    let seat = |seed| Seat::new(shape, Arc::clone(&logits), seed as u64);
    let mut seats: Vec<Seat> = (0..args.sessions).map(seat).collect::<Result<_>>()?;
    let crews = || [Crew::alone(), Crew::new(args.threads)];
    let mut crews: Vec<[Crew; 2]> = Part::ALL.iter().map(|_| crews()).collect();
    let mut times = vec![[Vec::new(), Vec::new()]; Part::ALL.len()];
    for round in 0..WARM_UP + 2 * args.rounds {
        seats.iter_mut().for_each(Seat::begin_round);
        let way = round % 2;
        for ((part, crews), times) in Part::ALL.into_iter().zip(&mut crews).zip(&mut times) {
            let start = Instant::now();
            crews[way].for_each(&mut seats, |seat| seat.run(part));
            if round >= WARM_UP {
                times[way].push(start.elapsed());
            }
        }
    }
    seats.iter().try_for_each(Seat::check)?;
    let bytes: usize = seats.iter().map(Seat::mask_bytes).sum();
    println!(
        "{} sessions at {} tokens, masks of {:.0} bytes; medians of {} rounds\n",
        args.sessions,
        args.context,
        bytes as f64 / args.sessions as f64,
        args.rounds
    );
    println!(
        "| part of a round | µs a session | ms one after another | ms with the engine's threads |"
    );
    println!("| --- | --- | --- | --- |");
    for (part, times) in Part::ALL.into_iter().zip(times) {
        let [alone, together] = times.map(median);
        println!(
            "| {} | {:.1} | {:.2} | {:.2} |",
            part.label(),
            alone * 1e3 / args.sessions as f64,
            alone,
            together
        );
    }
    Ok(())
}

/// In milliseconds.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e3
}
