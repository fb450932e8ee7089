//! What `deploy/` tells the programs to do is what they take: every flag in it is one of theirs.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use specattn_tests::binaries::{self, workspace};

/// Flags of the other programs that the files call.
const FOREIGN: &[&str] = &[
    "build",
    "from",
    "mount",
    "no-install-recommends",
    "operator",
    "release",
    "locked",
    "reuse-values",
    "scale",
    "set",
    "system",
    "target",
    "uid",
    "create-home",
];

/// The flags in a text: words that begin with two dashes.
fn flags(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .filter_map(|word| word.strip_prefix("--"))
        .filter(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
        .map(str::to_owned)
        .collect()
}

fn read_all(folder: &Path, texts: &mut Vec<(String, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, texts);
        } else if path.extension().is_none_or(|end| end != "json") && !path.ends_with("check") {
            texts.push((
                path.display().to_string(),
                std::fs::read_to_string(&path).unwrap(),
            ));
        }
    }
}

#[test]
fn every_flag_exists() {
    let mut known: BTreeSet<String> = FOREIGN.iter().map(|flag| (*flag).to_owned()).collect();
    for program in ["specattn-gateway", "specattn-verify", "specattn-draft"] {
        let help = Command::new(binaries::path(program))
            .arg("--help")
            .output()
            .unwrap();
        assert!(help.status.success());
        known.extend(flags(&String::from_utf8(help.stdout).unwrap()));
    }
    let mut texts = Vec::new();
    read_all(&workspace().join("deploy"), &mut texts);
    assert!(texts.len() > 8, "the folder is there");
    for (path, text) in texts {
        for flag in flags(&text) {
            assert!(
                known.contains(&flag),
                "{path} has --{flag}, which no program takes"
            );
        }
    }
}
