//! What the draft may leave unread: acceptance, mask quality and system KV bytes by how often it captures attention.
//!
//! `cargo run --release -p specattn-bench --bin draft -- BOOK.txt...`

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use specattn_bench::book;
use specattn_bench::draft::{Figures, Pair, Setting};
use specattn_draft::OwnPolicy;
use specattn_engine::sampling::SamplingParams;
use specattn_engine::{LoadOptions, Model};
use specattn_mask::{LayerMap, MaskPolicy, alignment};

/// Runs speculative rounds under several ways of reading the draft's own KV cache.
#[derive(Debug, Parser)]
struct Args {
    /// Books to continue.
    #[arg(value_name = "TEXT", required = true)]
    books: Vec<PathBuf>,
    /// The target's checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/target")]
    target: PathBuf,
    /// The draft's checkpoint folder.
    #[arg(long, value_name = "DIR", default_value = "models/draft")]
    draft: PathBuf,
    /// Tokens of context at the end of a run.
    #[arg(long, value_delimiter = ',', default_value = "1024,4096,8192")]
    contexts: Vec<usize>,
    /// Tokens to generate at the end of each context.
    #[arg(long, default_value_t = 192)]
    tokens: usize,
    /// Draft tokens per round.
    #[arg(long, default_value_t = 4)]
    draft_length: usize,
    /// Settings, as CAPTURE_EVERY:P; P is left out for 1, which captures every step.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,2:0.8,4:0.8,4:0.95,8:0.8"
    )]
    settings: Vec<String>,
    /// Masses of the target's masks.
    #[arg(long, value_delimiter = ',', default_value = "0.8,0.9,0.95")]
    mask_p: Vec<f32>,
    /// Sampling temperature.
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Also take rows from sparse steps.
    #[arg(long)]
    listen: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let load = |folder: &PathBuf| {
        Model::load(folder, &LoadOptions::default(), &mut |_, _| {})
            .with_context(|| folder.display().to_string())
    };
    let (mut draft, mut target) = (load(&args.draft)?, load(&args.target)?);
    let map = layer_map(&args, &draft, &target)?;
    let settings = settings(&args)?;
    let runs = args.contexts.len() * args.books.len() * settings.len();
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} runs, {eta} left")?;
    let progress = ProgressBar::new(runs as u64).with_style(style);
    let entry = |model: &Model| 8 * model.config().head_dim as u64;
    let entry_bytes = (entry(&draft), entry(&target));
    print_head(&args);
    for &context in &args.contexts {
        ensure!(
            context > args.tokens + 1,
            "context {context} has no room for a prompt"
        );
        let room = args.tokens + args.draft_length + 1;
        let mut figures = vec![Figures::new(args.mask_p.len()); settings.len()];
        for text in &args.books {
            let tokenizer = args.target.join("tokenizer.json");
            // Room for the last round beyond the tokens asked for.
            let prompt = book::tokens(&tokenizer, text, context - room)?;
            let mut pair = Pair::new((&mut draft, &mut target), &map, prompt, room)?;
            for (setting, figures) in settings.iter().zip(&mut figures) {
                figures.add(&pair.run(setting, args.tokens)?);
                progress.inc(1);
            }
        }
        let dense = figures[0].system_bytes_per_token(None, entry_bytes);
        for (setting, figures) in settings.iter().zip(&figures) {
            print_row(context, setting, figures, dense, entry_bytes);
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn layer_map(args: &Args, draft: &Model, target: &Model) -> Result<LayerMap> {
    let (d, t) = (draft.config(), target.config());
    let path = args.target.join(alignment::FILE_NAME);
    if path.exists() {
        return Ok(LayerMap::load(&path)?);
    }
    eprintln!("no {}: proportional depth", path.display());
    Ok(LayerMap::proportional(
        t.num_layers as u32,
        t.num_kv_heads as u32,
        d.num_layers as u32,
        d.num_heads as u32,
    ))
}

fn settings(args: &Args) -> Result<Vec<Setting>> {
    let setting = |text: &String| {
        let (every, p) = text.split_once(':').unwrap_or((text, "1"));
        let own = OwnPolicy {
            capture_every: every.parse().with_context(|| text.clone())?,
            p: p.parse().with_context(|| text.clone())?,
        };
        ensure!(
            own.capture_every > 0 && own.p > 0.0 && own.p <= 1.0,
            "setting {text}"
        );
        Ok(Setting {
            own,
            draft_length: args.draft_length,
            masks: args
                .mask_p
                .iter()
                .map(|&p| MaskPolicy {
                    p,
                    ..MaskPolicy::default()
                })
                .collect(),
            sampling: SamplingParams {
                temperature: args.temperature,
                seed: 7,
                ..SamplingParams::default()
            },
            listen: args.listen,
        })
    };
    args.settings.iter().map(setting).collect()
}

fn print_head(args: &Args) {
    let masks = args
        .mask_p
        .iter()
        .map(|p| format!(" p {p}: kept | KL | top-1 | bytes/round | system bytes |"));
    println!(
        "| context | capture every | own p | draft kept | tokens/forward | system bytes, dense target |{}",
        masks.collect::<String>()
    );
    println!("|{}", " --- |".repeat(6 + 5 * args.mask_p.len()));
}

/// System bytes are per committed token, as a share of `dense`: a dense draft before a dense target.
fn print_row(
    context: usize,
    setting: &Setting,
    figures: &Figures,
    dense: f64,
    entry_bytes: (u64, u64),
) {
    let system = |mask| figures.system_bytes_per_token(mask, entry_bytes) / dense;
    let masks = figures.masks.iter().enumerate().map(|(index, mask)| {
        format!(
            " {:.3} | {:.4} | {:.3} | {:.0} | {:.3} |",
            mask.kept(),
            mask.mean_divergence(),
            mask.agreement(),
            mask.bytes as f64 / figures.rounds as f64,
            system(Some(index))
        )
    });
    println!(
        "| {context} | {} | {} | {:.3} | {:.3} | {:.3} |{}",
        setting.own.capture_every,
        setting.own.p,
        figures.draft_kept(),
        figures.tokens_per_forward(),
        system(None),
        masks.collect::<String>()
    );
}
