//! docs/cli.md is what the programs' own command lines say.
//!
//! `SPECATTN_WRITE_DOCS=1 cargo test -p specattn-cli --test reference` rewrites it.
#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::Path;

use clap::{Arg, Command, CommandFactory};
use specattn_service::args::{Service, command};

/// One program or subcommand: what it does, then its arguments by heading.
fn describe(page: &mut String, name: &str, command: &Command, level: usize) {
    writeln!(page, "\n{} {name}\n", "#".repeat(level)).unwrap();
    if let Some(about) = command.get_long_about().or(command.get_about()) {
        writeln!(page, "{about}\n").unwrap();
    }
    let mut heading = None;
    let mut arguments: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version"))
        .collect();
    // Stable: within a heading the order is the program's own.
    arguments.sort_by_key(|arg| arg.get_help_heading().is_some());
    if !arguments.is_empty() {
        writeln!(
            page,
            "| argument | default | environment | |\n| --- | --- | --- | --- |"
        )
        .unwrap();
    }
    for arg in arguments {
        if arg.get_help_heading() != heading {
            heading = arg.get_help_heading();
            writeln!(page, "| **{}** | | | |", heading.unwrap_or_default()).unwrap();
        }
        let defaults: Vec<_> = arg
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy())
            .collect();
        let env = arg
            .get_env()
            .map_or_else(String::new, |env| format!("`{}`", env.to_string_lossy()));
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        writeln!(
            page,
            "| `{}` | {} | {env} | {} |",
            spelling(arg),
            defaults.join(" "),
            help.replace('|', "\\|").replace('\n', " ")
        )
        .unwrap();
    }
    for sub in command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
    {
        describe(page, &format!("{name} {}", sub.get_name()), sub, level + 1);
    }
}

/// How an argument is written.
fn spelling(arg: &Arg) -> String {
    let takes_value = arg.get_action().takes_values();
    let names = arg.get_value_names().unwrap_or_default();
    let value = match names.first() {
        Some(name) if takes_value => name.to_string(),
        _ => String::new(),
    };
    match arg.get_long() {
        Some(long) => format!("--{long} {value}").trim_end().to_owned(),
        None => value,
    }
}

#[test]
fn the_reference_is_up_to_date() {
    let mut page = "# Command lines\n\nWritten from the programs' own help by \
                    `SPECATTN_WRITE_DOCS=1 cargo test -p specattn-cli --test reference`; do not edit.\n"
        .to_owned();
    let programs = [
        ("specattn", specattn_cli::args::Cli::command()),
        (
            "specattn-gateway",
            command::<specattn_gateway::Args>(Service::Gateway),
        ),
        (
            "specattn-verify",
            command::<specattn_verify::Args>(Service::Verify),
        ),
        (
            "specattn-draft",
            command::<specattn_draft::Args>(Service::Draft),
        ),
    ];
    for (name, mut command) in programs {
        command.build();
        describe(&mut page, name, &command, 2);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    if std::env::var_os("SPECATTN_WRITE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == page,
        "docs/cli.md is out of date: SPECATTN_WRITE_DOCS=1 cargo test -p specattn-cli --test reference"
    );
}
