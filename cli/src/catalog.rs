//! `specattn models`: pairs of models that go together, and their layer maps.
//!
//! Of public pairs the list says what their cards say: that they share a tokenizer and a vocabulary. Whether a pair does is
//! checked when it starts; how well it does is measured by `specattn eval`.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use specattn_hub::{RepoName, Settings, Wanted};
use specattn_mask::LayerMap;
use specattn_mask::alignment::FILE_NAME;

use crate::args::ModelArgs;
use crate::error::CliError;
use crate::generate::write_out;
use crate::models::ModelFolders;
use crate::table::Table;

/// Public pairs, smallest first: target and draft.
const PUBLIC: [[&str; 2]; 6] = [
    ["Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"],
    ["Qwen/Qwen3-4B", "Qwen/Qwen3-0.6B"],
    ["Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B"],
    [
        "meta-llama/Llama-2-7b-chat-hf",
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ],
    [
        "meta-llama/Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
    ],
    ["Qwen/Qwen3-32B", "Qwen/Qwen3-0.6B"],
];

/// `specattn models`.
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// Print one JSON array instead of a table
    #[arg(long)]
    pub json: bool,
}

/// A pair, and what is known of it.
#[derive(Debug, Serialize)]
struct Pair {
    target: String,
    draft: String,
    /// How draft heads are matched to the target's.
    map: String,
    /// Whether the project has measured what masks cost with it, and where.
    measured: Option<&'static str>,
    /// Both are on this machine.
    here: bool,
}

/// Runs the command.
///
/// # Errors
/// [`CliError::Write`].
pub fn run(args: &ModelsArgs) -> Result<(), CliError> {
    let settings = Settings::from_env();
    let bundled = ModelFolders::find(&ModelArgs::default(), true).ok();
    let pairs: Vec<Pair> = bundled
        .iter()
        .map(of_bundle)
        .chain(PUBLIC.iter().map(|pair| of_hub(pair, &settings)))
        .collect();
    let text = if args.json {
        let json = serde_json::to_string(&pairs).map_err(|e| CliError::Write(e.into()))?;
        json + "\n"
    } else {
        table(&pairs)
    };
    write_out(text.as_bytes())
}

fn of_bundle(folders: &ModelFolders) -> Pair {
    let name = |folder: &Path| folder.display().to_string();
    Pair {
        target: name(&folders.target),
        draft: folders.draft.as_deref().map(name).unwrap_or_default(),
        map: map_of(&folders.target),
        measured: Some("bench/quality"),
        here: true,
    }
}

fn of_hub(pair: &[&str; 2], settings: &Settings) -> Pair {
    let cached = |name: &str| {
        let name: RepoName = name.parse().ok()?;
        specattn_hub::cached(&name, Wanted::Checkpoint, settings)
    };
    let [target, draft] = pair.map(cached);
    Pair {
        target: pair[0].to_owned(),
        draft: pair[1].to_owned(),
        map: target.as_deref().map_or_else(proportional, map_of),
        measured: None,
        here: target.is_some() && draft.is_some(),
    }
}

fn proportional() -> String {
    "proportional".to_owned()
}

/// What lies beside a target.
fn map_of(target: &Path) -> String {
    let path = target.join(FILE_NAME);
    if !path.exists() {
        return proportional();
    }
    match LayerMap::load(&path) {
        Ok(map) => {
            let divergences = map.calibration.iter().flat_map(|c| c.divergences.iter());
            let all: Vec<f32> = divergences.flatten().copied().collect();
            let mean = all.iter().sum::<f32>() / all.len().max(1) as f32;
            format!("{} sources, mean KL {mean:.3}", map.sources.len())
        }
        Err(error) => format!("unreadable: {error}"),
    }
}

fn table(pairs: &[Pair]) -> String {
    let mut table = Table::new(["TARGET", "DRAFT", "LAYER MAP", "MEASURED", "HERE"]);
    for pair in pairs {
        table.row([
            pair.target.clone(),
            pair.draft.clone(),
            pair.map.clone(),
            pair.measured.unwrap_or("not measured").to_owned(),
            if pair.here { "yes" } else { "no" }.to_owned(),
        ]);
    }
    let notes = "\nNames work wherever a folder does (--target, --draft, --model, --tokenizer), with @REVISION to pin one. A map other \
                 than the proportional one is fitted by `specattn align`.\n";
    table.render("no models") + notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_public_pair_is_two_names() {
        for name in PUBLIC.iter().flatten() {
            let parsed: RepoName = name.parse().unwrap();
            assert_eq!(parsed.to_string(), *name);
        }
    }

    #[test]
    fn the_table_tells_what_is_measured() {
        let nowhere = Settings {
            cache: Some("/nowhere".into()),
            ..Settings::default()
        };
        let bundled = ModelFolders::find(&ModelArgs::default(), true).unwrap();
        let text = table(&[of_bundle(&bundled), of_hub(&PUBLIC[0], &nowhere)]);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("sources, mean KL"), "{text}");
        assert!(lines[1].ends_with("bench/quality  yes"), "{text}");
        assert!(lines[2].contains("proportional  "), "{text}");
        assert!(lines[2].ends_with("not measured   no"), "{text}");
    }
}
