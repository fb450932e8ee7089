//! Times what masks cost the draft: captured steps beside plain and sparse ones, mixing and selecting, the draft's own
//! selection, encoding.
//!
//! `cargo run --release -p specattn-bench --bin selecting -- BOOK.txt`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use specattn_bench::book;
use specattn_draft::{OwnPolicy, OwnReads, RowSelector};
use specattn_engine::{HeadLists, LoadOptions, LogitRows, Model, Sequence, Step, StepOutput};
use specattn_mask::{Encoder, LayerMap, MaskPolicy, alignment};

/// Times the parts of a draft step.
#[derive(Debug, Parser)]
struct Args {
    /// The book to read.
    #[arg(value_name = "TEXT")]
    book: PathBuf,
    /// The target's checkpoint folder: its layer map says what is mixed.
    #[arg(long, value_name = "DIR", default_value = "models/target")]
    target: PathBuf,
    /// The draft's checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/draft")]
    draft: PathBuf,
    /// Tokens of context.
    #[arg(long, value_delimiter = ',', default_value = "1000,6000")]
    contexts: Vec<usize>,
    /// Rounds to take the median of.
    #[arg(long, default_value_t = 100)]
    rounds: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut model = Model::load(&args.draft, &LoadOptions::default(), &mut |_, _| {})
        .context("loading the draft")?;
    let map = LayerMap::load(&args.target.join(alignment::FILE_NAME))?;
    println!(
        "µs, medians of {} rounds, {} sources\n",
        args.rounds,
        map.sources.len()
    );
    println!(
        "| context | plain step | captured step | sparse step | masks: mix and select | own selection | encode |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for &context in &args.contexts {
        let tokenizer = args.draft.join("tokenizer.json");
        let text = book::tokens(&tokenizer, &args.book, context + args.rounds)?;
        let medians = time(&mut model, &map, &text, context)?;
        let cells: Vec<String> = medians.iter().map(|us| format!("{us:.0}")).collect();
        println!("| {context} | {} |", cells.join(" | "));
    }
    Ok(())
}

/// Medians in µs, in the order of the table's columns; round `i` is one step over token `context + i`.
fn time(model: &mut Model, map: &LayerMap, text: &[u32], context: usize) -> Result<Vec<f64>> {
    let config = model.config().clone();
    let layers: Vec<usize> = (0..config.num_layers).collect();
    let policy = MaskPolicy::default();
    let mut rows = RowSelector::new(policy, map.sources.clone());
    let mut encoder = Encoder::new();
    let mut own = OwnReads::new(OwnPolicy::default(), &policy, config.num_kv_heads);
    let mut sequence = model.new_sequence(text.len())?;
    for chunk in text[..context].chunks(512) {
        step(model, &mut sequence, chunk, None, &[])?;
    }
    let mut times = vec![Vec::new(); 6];
    for &token in &text[context..] {
        let past = sequence.len();
        let input = [token];
        let mut column = 0;
        let mut note = |since: Instant| {
            times[column].push(since.elapsed());
            column += 1;
        };
        let start = Instant::now();
        step(model, &mut sequence, &input, None, &[])?;
        note(start);
        sequence.truncate(past);
        let start = Instant::now();
        let output = step(model, &mut sequence, &input, None, &layers)?;
        note(start);
        let attention = output.attention.context("a captured step has rows")?;
        sequence.truncate(past);
        own.captured(&attention);
        own.fit(past);
        let start = Instant::now();
        step(model, &mut sequence, &input, Some(own.lists()), &[])?;
        note(start);
        rows.begin(past);
        let start = Instant::now();
        rows.add_step(&attention)?;
        note(start);
        let start = Instant::now();
        own.captured(&attention);
        note(start);
        let start = Instant::now();
        std::hint::black_box(encoder.encode(rows.finish()));
        note(start);
    }
    Ok(times.into_iter().map(median).collect())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn step(
    model: &mut Model,
    sequence: &mut Sequence,
    tokens: &[u32],
    lists: Option<&HeadLists>,
    capture: &[usize],
) -> Result<StepOutput> {
    let step = Step {
        lists,
        logits: LogitRows::Last,
        capture,
        ..Step::new(sequence, tokens)
    };
    model.forward(&mut [step])?.pop().context("an output")
}
