//! `specattn eval`: what masks cost in quality, beside other methods at the same budget.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use specattn_draft::OwnPolicy;
use specattn_mask::alignment::FILE_NAME;
use specattn_mask::{LayerMap, MaskPolicy, PairShape};
use specattn_quality::eval::{
    Figures, Method, Plan, Row, ServedMap, Setting, Window, equal_budget, measure, plot, report,
};
use specattn_quality::recording::pair_shape;
use specattn_quality::{Book, QualityError};

use crate::align::{load_draft, load_target, time_bar};
use crate::args::ModelArgs;
use crate::error::CliError;
use crate::models::ModelFolders;
use crate::pair;
use crate::shards::{Message, Sums, in_processes};

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

    /// Methods to compare
    #[arg(
        long,
        value_enum,
        value_name = "METHOD",
        value_delimiter = ',',
        default_value = "dense,ours,paper,streaming-llm,h2o,quest,oracle"
    )]
    pub methods: Vec<MethodArg>,

    /// Masses for methods that keep a share of attention
    #[arg(
        long,
        value_name = "P",
        value_delimiter = ',',
        default_value = "0.6,0.7,0.8,0.88,0.92,0.95,0.97,0.985"
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

    /// Layer maps to evaluate; the first is the one that others are compared with [default: the one beside the target]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub map: Vec<PathBuf>,

    /// The paper's layer map, made by align --map layer [default: proportional depth]
    #[arg(long, value_name = "FILE")]
    pub paper_map: Option<PathBuf>,

    /// Draft steps from one captured step to the next; of several the first serves every map, the others only the first
    /// map. The paper's captures every step [default: the draft worker's]
    #[arg(long, value_name = "STEPS", value_delimiter = ',')]
    pub capture_every: Vec<usize>,

    /// First positions that are always read
    #[arg(long, value_name = "N", default_value_t = MaskPolicy::default().sink_tokens)]
    pub sink_tokens: u32,

    /// Last positions that are always read
    #[arg(long, value_name = "N", default_value_t = MaskPolicy::default().window_tokens)]
    pub window_tokens: u32,

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

/// Methods on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MethodArg {
    /// The target reads everything
    Dense,
    /// The maps given, as served
    Ours,
    /// One draft layer per target layer and no memory
    Paper,
    /// Sinks and a window
    StreamingLlm,
    /// Heavy hitters
    H2o,
    /// Pages by bounds on their keys
    Quest,
    /// The target's own top-p of the round before
    Previous,
    /// The target's own top-p
    Oracle,
}

/// Runs the command.
///
/// # Errors
/// [`CliError`] when models, texts or maps are not there or do not go together, or results cannot be written.
pub fn run(args: &EvalArgs) -> Result<(), CliError> {
    let settings = settings(args)?;
    let names = map_names(args);
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
            name: method_name(setting.method, &names),
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
    let table = format!(
        "{}\n{}",
        equal_budget::markdown(&rows),
        report::markdown(&rows)
    );
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
        ("eval.svg", plot::svg(&rows)),
    ];
    for (name, text) in files {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|source| failed(&path, source))?;
    }
    Ok(())
}

/// Names of the maps, in the order of the plan: the first map, the paper's, further maps, further draft policies.
fn map_names(args: &EvalArgs) -> Vec<String> {
    let mut names = vec![
        "SpecAttn, this map".to_owned(),
        "SpecAttn, the paper's layer map".to_owned(),
    ];
    for file in args.map.iter().skip(1) {
        let stem = file.file_stem().unwrap_or(file.as_os_str());
        names.push(format!("SpecAttn, {}", stem.to_string_lossy()));
    }
    for steps in args.capture_every.iter().skip(1) {
        names.push(format!("SpecAttn, this map, captured every {steps}"));
    }
    names
}

fn method_name(method: Method, maps: &[String]) -> String {
    match method {
        Method::Map(index) => maps[index].clone(),
        Method::Dense => "dense".to_owned(),
        Method::StreamingLlm => "StreamingLLM".to_owned(),
        Method::H2o => "H2O".to_owned(),
        Method::Quest => "Quest".to_owned(),
        Method::Previous => "previous round's top-p".to_owned(),
        Method::Oracle => "oracle top-p".to_owned(),
    }
}

/// The maps that [`map_names`] names.
fn maps(args: &EvalArgs, beside: PathBuf, pair: &PairShape) -> Result<Vec<ServedMap>, CliError> {
    let read = |path: &PathBuf| -> Result<Arc<LayerMap>, CliError> {
        let map = LayerMap::load(path).map_err(QualityError::from)?;
        map.validate(pair).map_err(QualityError::from)?;
        Ok(Arc::new(map))
    };
    let own = |steps: Option<&usize>| {
        let mut own = OwnPolicy::default();
        own.capture_every = *steps.unwrap_or(&own.capture_every);
        own
    };
    let first = own(args.capture_every.first());
    let this = read(args.map.first().unwrap_or(&beside))?;
    let paper = match &args.paper_map {
        Some(path) => read(path)?,
        None => Arc::new(LayerMap::proportional(
            pair.target_layers,
            pair.target_kv_heads,
            pair.draft_layers,
            pair.draft_heads,
        )),
    };
    let served = |map, own| ServedMap { map, own };
    let mut maps = vec![
        served(Arc::clone(&this), first),
        served(paper, own(Some(&1))),
    ];
    for file in args.map.iter().skip(1) {
        maps.push(served(read(file)?, first));
    }
    for steps in args.capture_every.iter().skip(1) {
        maps.push(served(Arc::clone(&this), own(Some(steps))));
    }
    Ok(maps)
}

fn settings(args: &EvalArgs) -> Result<Vec<Setting>, CliError> {
    if args.capture_every.contains(&0) {
        let refusal = "--capture-every must be at least 1";
        return Err(CliError::Usage(refusal.to_owned()));
    }
    let mut settings = Vec::new();
    for method in &args.methods {
        let methods = match method {
            MethodArg::Dense => vec![Method::Dense],
            MethodArg::Ours => {
                let further = (2..map_names(args).len()).map(Method::Map);
                std::iter::once(Method::Map(0)).chain(further).collect()
            }
            MethodArg::Paper => vec![Method::Map(1)],
            MethodArg::StreamingLlm => vec![Method::StreamingLlm],
            MethodArg::H2o => vec![Method::H2o],
            MethodArg::Quest => vec![Method::Quest],
            MethodArg::Previous => vec![Method::Previous],
            MethodArg::Oracle => vec![Method::Oracle],
        };
        for method in methods {
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
    pair::check(&folders)?;
    let mut target = load_target(&folders.target, &args.models)?;
    let mut draft = load_draft(draft_folder, &args.models)?;
    let pair = pair_shape(&target, &draft);
    let plan = Plan {
        settings: settings.to_vec(),
        maps: maps(args, folders.target.join(FILE_NAME), &pair)?,
        policy: MaskPolicy {
            sink_tokens: args.sink_tokens,
            window_tokens: args.window_tokens,
            ..MaskPolicy::default()
        },
    };
    plan.policy.validate().map_err(QualityError::from)?;
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
        let args = parse(
            "--text a --methods dense,ours,streaming-llm --p 0.8,0.9 --budgets 0.1 --capture-every 1,2",
        );
        let settings = settings(&args).unwrap();
        let names: Vec<_> = settings.iter().map(|s| (s.method, s.value)).collect();
        assert_eq!(
            names,
            [
                (Method::Dense, 1.0),
                (Method::Map(0), 0.8),
                (Method::Map(0), 0.9),
                (Method::Map(2), 0.8),
                (Method::Map(2), 0.9),
                (Method::StreamingLlm, 0.1)
            ]
        );
        assert_eq!(map_names(&args)[2], "SpecAttn, this map, captured every 2");
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        for line in ["--text a --p 1.5", "--text a --capture-every 1,0"] {
            assert!(settings(&parse(line)).is_err(), "{line}");
        }
    }
}
