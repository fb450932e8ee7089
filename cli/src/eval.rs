//! `specattn eval`: what masks cost in quality, beside other methods at the same budget.
//!
//! With `--jobs N` the windows are shared among N processes of this program, each with one thread: models of one process
//! take turns on its threads, processes do not. A child prints one JSON object a line: how far it is, then its sums.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, mpsc};

use clap::Args;
use serde::{Deserialize, Serialize};
use specattn_draft::OwnPolicy;
use specattn_engine::KvReads;
use specattn_mask::alignment::FILE_NAME;
use specattn_mask::{LayerMap, MaskPolicy};
use specattn_quality::eval::{Figures, Method, Plan, Row, Setting, Window, measure, report};
use specattn_quality::recording::pair_shape;
use specattn_quality::{Book, QualityError};

use crate::align::{load, time_bar};
use crate::args::ModelArgs;
use crate::error::CliError;
use crate::models::ModelFolders;

/// `specattn eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Texts to read: long plain-text files that calibration did not use
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub text: Vec<PathBuf>,

    /// Tokens per window; the first half is prompt
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "4096,8192"
    )]
    pub contexts: Vec<usize>,

    /// Windows per text and context
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub windows: usize,

    /// Judge at most so many tokens of a window, its last ones [default: its second half]
    #[arg(long, value_name = "N")]
    pub judged: Option<usize>,

    /// Methods by their number in the table: 0 dense, 1 this map, 2 the paper's, 3 StreamingLLM, 4 H2O, 5 Quest, 6 oracle
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "0,1,2,3,4,5,6"
    )]
    pub methods: Vec<usize>,

    /// Masses for methods that keep a share of attention
    #[arg(
        long,
        value_name = "P",
        value_delimiter = ',',
        default_value = "0.5,0.65,0.75,0.8,0.85,0.9,0.93,0.95,0.97,0.985"
    )]
    pub p: Vec<f32>,

    /// Shares of the context for methods that keep a fixed part of it
    #[arg(
        long,
        value_name = "SHARE",
        value_delimiter = ',',
        default_value = "0.05,0.1,0.15,0.2,0.3,0.5"
    )]
    pub budgets: Vec<f32>,

    /// Layer map to evaluate [default: the one beside the target]
    #[arg(long, value_name = "FILE")]
    pub map: Option<PathBuf>,

    /// The paper's layer map, made by align --map layer [default: proportional depth]
    #[arg(long, value_name = "FILE")]
    pub paper_map: Option<PathBuf>,

    /// Draft steps from one captured step to the next [default: the draft worker's]
    #[arg(long, value_name = "STEPS")]
    pub capture_every: Option<usize>,

    /// Processes to share the windows among; 1 runs in this one
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub jobs: usize,

    /// Write eval.md, eval.csv and eval.svg into this folder
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Of the windows, the share of one process: K of N
    #[arg(long, value_name = "K/N", hide = true)]
    pub shard: Option<String>,

    /// The pair.
    #[command(flatten)]
    pub models: ModelArgs,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Tokens done and tokens in all.
    Progress(u64, u64),
    /// Context, index of the setting, and its sums.
    Sums(usize, usize, Sums),
}

/// [`Figures`] on a pipe.
#[derive(Debug, Serialize, Deserialize)]
struct Sums {
    positions: u64,
    kl: f64,
    agreements: u64,
    nll: f64,
    dense_nll: f64,
    read: u64,
    dense: u64,
    rounds: u64,
    mask_bytes: u64,
}

impl From<&Figures> for Sums {
    fn from(f: &Figures) -> Self {
        Self {
            positions: f.positions,
            kl: f.kl,
            agreements: f.agreements,
            nll: f.nll,
            dense_nll: f.dense_nll,
            read: f.kv.read,
            dense: f.kv.dense,
            rounds: f.rounds,
            mask_bytes: f.mask_bytes,
        }
    }
}

impl From<Sums> for Figures {
    fn from(s: Sums) -> Self {
        Self {
            positions: s.positions,
            kl: s.kl,
            agreements: s.agreements,
            nll: s.nll,
            dense_nll: s.dense_nll,
            kv: KvReads {
                read: s.read,
                dense: s.dense,
            },
            rounds: s.rounds,
            mask_bytes: s.mask_bytes,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`CliError`] when models, texts or maps are not there or do not go together, or results cannot be written.
pub fn run(args: &EvalArgs) -> Result<(), CliError> {
    let settings = settings(args)?;
    if let Some(shard) = &args.shard {
        let parts = shard.split_once('/').and_then(|(k, n)| {
            let (k, n) = (k.parse::<usize>().ok()?, n.parse::<usize>().ok()?);
            (k < n).then_some((k, n))
        });
        let part = parts.ok_or_else(|| CliError::Usage("--shard takes K/N".to_owned()))?;
        return evaluate(args, &settings, part, &mut |message| {
            let line = serde_json::to_string(&message).map_err(std::io::Error::from);
            let mut out = std::io::stdout().lock();
            line.and_then(|line| writeln!(out, "{line}"))
                .map_err(CliError::Write)
        });
    }
    let bar = time_bar("evaluating", !args.quiet);
    let mut rows: Vec<Row> = Vec::new();
    for &context in &args.contexts {
        rows.extend(settings.iter().map(|&setting| Row {
            context,
            setting,
            figures: Figures::default(),
        }));
    }
    let mut take = |context: usize, index: usize, sums: Sums| {
        let block = args.contexts.iter().position(|&c| c == context);
        if let Some(row) = block.and_then(|b| rows.get_mut(b * settings.len() + index)) {
            row.figures.add(&sums.into());
        }
    };
    if args.jobs > 1 {
        in_processes(args.jobs, &bar, &mut take)?;
    } else {
        evaluate(args, &settings, (0, 1), &mut |message| {
            match message {
                Message::Progress(done, total) => {
                    bar.set_length(total);
                    bar.set_position(done);
                }
                Message::Sums(context, index, sums) => take(context, index, sums),
            }
            Ok(())
        })?;
    }
    bar.finish_and_clear();
    let table = report::markdown(&rows);
    print!("{table}");
    let Some(folder) = &args.out else {
        return Ok(());
    };
    let failed = |path: &PathBuf, source| {
        CliError::from(QualityError::Io {
            path: path.clone(),
            source,
        })
    };
    fs::create_dir_all(folder).map_err(|source| failed(folder, source))?;
    let files = [
        ("eval.md", table),
        ("eval.csv", report::csv(&rows)),
        ("eval.svg", report::svg(&rows)),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|source| failed(&path, source))?;
    }
    Ok(())
}

fn settings(args: &EvalArgs) -> Result<Vec<Setting>, CliError> {
    let mut settings = Vec::new();
    for &number in &args.methods {
        let Some(&method) = Method::ALL.get(number) else {
            return Err(CliError::Usage(format!("there is no method {number}")));
        };
        let values = match method {
            Method::Dense => &[1.0][..],
            _ if method.is_by_mass() => &args.p,
            _ => &args.budgets,
        };
        if let Some(value) = values.iter().find(|&&v| !(v > 0.0 && v <= 1.0)) {
            return Err(CliError::Usage(format!("{value} is not in (0, 1]")));
        }
        settings.extend(values.iter().map(|&value| Setting { method, value }));
    }
    Ok(settings)
}

/// Measures the windows of one share, longest first.
fn evaluate(
    args: &EvalArgs,
    settings: &[Setting],
    (share, shares): (usize, usize),
    tell: &mut dyn FnMut(Message) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let folders = ModelFolders::find(&args.models, true)?;
    let Some(draft_folder) = &folders.draft else {
        return Err(CliError::Usage("--target needs its --draft".to_owned()));
    };
    let mut target = load(&folders.target, &args.models)?;
    let mut draft = load(draft_folder, &args.models)?;
    let pair = pair_shape(&target, &draft);
    let read = |path: &PathBuf| -> Result<Arc<LayerMap>, QualityError> {
        let map = LayerMap::load(path)?;
        map.validate(&pair)?;
        Ok(Arc::new(map))
    };
    let beside = folders.target.join(FILE_NAME);
    let proportional = || {
        Arc::new(LayerMap::proportional(
            pair.target_layers,
            pair.target_kv_heads,
            pair.draft_layers,
            pair.draft_heads,
        ))
    };
    let mut own = OwnPolicy::default();
    own.capture_every = args.capture_every.unwrap_or(own.capture_every).max(1);
    let plan = Plan {
        settings: settings.to_vec(),
        map: read(args.map.as_ref().unwrap_or(&beside))?,
        paper_map: match &args.paper_map {
            Some(path) => read(path)?,
            None => proportional(),
        },
        policy: MaskPolicy::default(),
        own,
    };
    let mut contexts = args.contexts.clone();
    contexts.sort_unstable_by(|a, b| b.cmp(a));
    let books = args
        .text
        .iter()
        .map(|path| Book::read(&folders.target, path))
        .collect::<Result<Vec<_>, _>>()?;
    let mut windows = Vec::new();
    for &context in &contexts {
        if context < 64 {
            return Err(CliError::Usage(format!(
                "a context of {context} is too short"
            )));
        }
        for book in &books {
            let found = book.windows(context, args.windows)?;
            windows.extend(found.into_iter().map(|tokens| (context, tokens)));
        }
    }
    let mine: Vec<_> = windows.into_iter().skip(share).step_by(shares).collect();
    let judged = |context: usize| args.judged.unwrap_or(context / 2).clamp(16, context / 2);
    let total: u64 = mine
        .iter()
        .map(|&(c, _)| (judged(c) * settings.len()) as u64)
        .sum();
    let mut before = 0;
    for (context, tokens) in mine {
        let window = Window {
            tokens,
            prompt: context - judged(context),
        };
        let mut failed = Ok(());
        let figures = measure(&mut target, &mut draft, &window, &plan, &mut |done, _| {
            if failed.is_ok() {
                failed = tell(Message::Progress(before + done, total));
            }
        })?;
        failed?;
        before += (judged(context) * settings.len()) as u64;
        for (index, figures) in figures.iter().enumerate() {
            tell(Message::Sums(context, index, figures.into()))?;
        }
    }
    Ok(())
}

/// Shares the windows among `jobs` processes of this program.
fn in_processes(
    jobs: usize,
    bar: &indicatif::ProgressBar,
    take: &mut dyn FnMut(usize, usize, Sums),
) -> Result<(), CliError> {
    let failed = |reason: String| CliError::Start {
        service: "evaluation",
        reason,
    };
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let (sender, messages) = mpsc::sync_channel(64);
    let mut children = Vec::new();
    let mut readers = Vec::new();
    for share in 0..jobs {
        let mut child = Command::new(&program)
            .args(std::env::args_os().skip(1))
            .args(["--threads", "1", "--shard"])
            .arg(format!("{share}/{jobs}"))
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(error.to_string()))?;
        let output = child.stdout.take();
        children.push(child);
        let sender = sender.clone();
        readers.push(std::thread::spawn(move || {
            for line in output.into_iter().flat_map(|o| BufReader::new(o).lines()) {
                let message = line
                    .ok()
                    .and_then(|l| serde_json::from_str::<Message>(&l).ok());
                if sender.send((share, message)).is_err() {
                    return;
                }
            }
        }));
    }
    drop(sender);
    let mut progress = vec![(0, 0); jobs];
    for (share, message) in messages {
        match message {
            Some(Message::Progress(done, total)) => {
                progress[share] = (done, total);
                bar.set_length(progress.iter().map(|p| p.1).sum());
                bar.set_position(progress.iter().map(|p| p.0).sum());
            }
            Some(Message::Sums(context, index, sums)) => take(context, index, sums),
            None => return Err(failed("a process said something else".to_owned())),
        }
    }
    for mut child in children {
        let status = child.wait().map_err(|error| failed(error.to_string()))?;
        if !status.success() {
            return Err(failed(format!("a process ended with {status}")));
        }
    }
    for reader in readers {
        reader
            .join()
            .map_err(|_| failed("a reader panicked".to_owned()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: EvalArgs,
    }

    fn parse(line: &str) -> EvalArgs {
        let words = std::iter::once("eval").chain(line.split_whitespace());
        Line::try_parse_from(words).unwrap().args
    }

    #[test]
    fn settings_are_methods_times_masses_or_budgets() {
        let args = parse("--text a --methods 0,1,3 --p 0.8,0.9 --budgets 0.1");
        let settings = settings(&args).unwrap();
        let names: Vec<_> = settings.iter().map(|s| (s.method, s.value)).collect();
        assert_eq!(
            names,
            [
                (Method::Dense, 1.0),
                (Method::Ours, 0.8),
                (Method::Ours, 0.9),
                (Method::StreamingLlm, 0.1)
            ]
        );
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in ["--text a --methods 9", "--text a --p 1.5"] {
            assert!(settings(&parse(line)).is_err(), "{line}");
        }
    }
}
