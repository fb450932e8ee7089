//! `specattn align`: fits a layer map for a pair of models on calibration text.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use specattn_engine::{DeviceChoice, LoadOptions, Model};
use specattn_mask::alignment::FILE_NAME;
use specattn_quality::align::Remember;
use specattn_quality::{AlignOptions, Book, MapKind, Metric, align};

use crate::args::ModelArgs;
use crate::error::CliError;
use crate::models::ModelFolders;
use crate::pair;

/// `specattn align`.
#[derive(Debug, Args)]
pub struct AlignArgs {
    /// Calibration text: long plain-text files, one or more
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub text: Vec<PathBuf>,

    /// Where to write the map [default: alignment.json in the target's folder]
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,

    /// What a KV head of the target may follow
    #[arg(long, value_enum, default_value_t = MapArg::Mixture)]
    pub map: MapArg,

    /// Most mixtures in use: more fit better and cost more mask bytes
    #[arg(long, value_name = "N", default_value_t = AlignOptions::default().max_sources)]
    pub sources: usize,

    /// The distance by which layers and heads are matched, and which the map reports
    #[arg(long, value_enum, default_value_t = MetricArg::Kl)]
    pub metric: MetricArg,

    /// Tokens per window of text [default: 8192, or the models' context where that is shorter]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,

    /// Windows per file
    #[arg(long, value_name = "N", default_value_t = AlignOptions::default().windows)]
    pub windows: usize,

    /// Attention rows recorded per window; memory grows with rows, context and the heads of both models
    #[arg(long, value_name = "N", default_value_t = AlignOptions::default().rows)]
    pub rows: usize,

    /// What a round leaves of what the target's memory held before it, in [0, 1)
    #[arg(long, value_name = "SHARE", default_value_t = Remember::default().decay)]
    pub memory_decay: f32,

    /// How much more than p the target's memory covers, in log-odds
    #[arg(long, value_name = "X", default_value_t = Remember::default().p_offset, allow_negative_numbers = true)]
    pub memory_offset: f32,

    /// Of a round's mean attention row, the share of an entry's mass that counts for the position beside it, the share
    /// of that for the next, and so on; in [0, 1)
    #[arg(long, value_name = "SHARE", default_value_t = AlignOptions::default().spread.unwrap_or(0.0))]
    pub spread: f32,

    /// Keep the union of the steps' own selections, as the paper does, in place of the selection of their mean
    /// [default for the maps layer and head]
    #[arg(long)]
    pub union: bool,

    /// Of each source, in order: how much more than p its selections cover, in log-odds; eval tells what helps
    #[arg(
        long,
        value_name = "X",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    pub p_offset: Vec<f32>,

    /// Leave the target's own memory out [default for the maps layer and head: out]
    #[arg(long)]
    pub no_memory: bool,

    /// The pair.
    #[command(flatten)]
    pub models: ModelArgs,

    /// Show no progress
    #[arg(short, long)]
    pub quiet: bool,
}

/// Kinds of map on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MapArg {
    /// One draft layer per target layer, in order, by dynamic programming: the paper's
    Layer,
    /// The best single draft layer or head
    Head,
    /// A mixture of draft heads fitted by expectation-maximisation, shared within clusters
    Mixture,
}

impl From<MapArg> for MapKind {
    fn from(arg: MapArg) -> Self {
        match arg {
            MapArg::Layer => Self::Layer,
            MapArg::Head => Self::Head,
            MapArg::Mixture => Self::Mixture,
        }
    }
}

/// Metrics on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MetricArg {
    /// Kullback-Leibler divergence, the paper's
    Kl,
    /// Jensen-Shannon divergence
    Js,
    /// Share of the target's own top-p set that is missed
    Recall,
}

impl From<MetricArg> for Metric {
    fn from(arg: MetricArg) -> Self {
        match arg {
            MetricArg::Kl => Self::KullbackLeibler,
            MetricArg::Js => Self::JensenShannon,
            MetricArg::Recall => Self::Recall,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`CliError`] when the models or texts are not there, do not go together, or a file cannot be written.
pub fn run(args: &AlignArgs) -> Result<(), CliError> {
    let folders = ModelFolders::find(&args.models, true)?;
    let Some(draft_folder) = &folders.draft else {
        return Err(CliError::Usage("--target needs its --draft".to_owned()));
    };
    pair::check(&folders)?;
    let mut target = load_target(&folders.target, &args.models)?;
    let mut draft = load_draft(draft_folder, &args.models)?;
    let longest = target.config().max_context.min(draft.config().max_context);
    let context = args.context.unwrap_or(AlignOptions::default().context);
    let options = AlignOptions {
        kind: args.map.into(),
        max_sources: args.sources,
        metric: args.metric.into(),
        context: context.min(longest),
        windows: args.windows,
        rows: args.rows,
        memory: (args.map == MapArg::Mixture && !args.no_memory).then_some(Remember {
            decay: args.memory_decay,
            p_offset: args.memory_offset,
        }),
        spread: (args.map == MapArg::Mixture && !args.union).then_some(args.spread),
        p_offsets: args.p_offset.clone(),
    };
    let books = args
        .text
        .iter()
        .map(|path| Book::read(&folders.target, path))
        .collect::<Result<Vec<_>, _>>()?;
    let bar = time_bar("reading", !args.quiet);
    let map = align(
        &mut target,
        &mut draft,
        &books,
        &options,
        &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        },
    )?;
    bar.finish_and_clear();
    let out = match &args.out {
        Some(path) => path.clone(),
        None => folders.target.join(FILE_NAME),
    };
    map.save(&out)
        .map_err(specattn_quality::QualityError::from)?;
    let mean = map.calibration.as_ref().map_or(0.0, |c| {
        let all: Vec<f32> = c.divergences.iter().flatten().copied().collect();
        all.iter().sum::<f32>() / all.len().max(1) as f32
    });
    println!(
        "{}: {} sources, mean divergence {mean:.3}",
        out.display(),
        map.sources.len()
    );
    Ok(())
}

/// Loads a target as `args` say.
pub(crate) fn load_target(folder: &Path, args: &ModelArgs) -> Result<Model, CliError> {
    let options = LoadOptions {
        device: args.device.clone().unwrap_or(DeviceChoice::Auto),
        tensor_parallel: args.tensor_parallel,
        ..LoadOptions::default()
    };
    load(folder, args, options)
}

/// Loads a draft as `args` say.
pub(crate) fn load_draft(folder: &Path, args: &ModelArgs) -> Result<Model, CliError> {
    let options = LoadOptions {
        device: args.draft_device().unwrap_or(DeviceChoice::Auto),
        ..LoadOptions::default()
    };
    load(folder, args, options)
}

fn load(folder: &Path, args: &ModelArgs, on: LoadOptions) -> Result<Model, CliError> {
    let options = LoadOptions {
        kv_cache_bytes: args.kv_cache_mib << 20,
        threads: args.threads,
        kv_dtype: args.kv_type.map(Into::into),
        ..on
    };
    let model = Model::load(folder, &options, &mut |_, _| {});
    Ok(model.map_err(specattn_quality::QualityError::from)?)
}

/// A bar that tells the time left; none where standard error is no terminal, or when not wanted.
pub(crate) fn time_bar(what: &str, wanted: bool) -> ProgressBar {
    if !wanted || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg} [{bar:32}] {percent} %, {eta} left")
        .expect("the template is well-formed");
    ProgressBar::no_length()
        .with_style(style.progress_chars("=> "))
        .with_message(what.to_owned())
}
