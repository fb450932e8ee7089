//! [`in_processes`]: an evaluation shared among processes of this program, each with one thread.
//!
//! Models of one process take turns on its threads, processes do not. A child prints one JSON object a line: how far it
//! is, then its sums.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use serde::{Deserialize, Serialize};
use specattn_engine::KvReads;
use specattn_quality::eval::Figures;

use crate::error::CliError;

/// What a child says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// Tokens done and tokens in all.
    Progress(u64, u64),
    /// Context, index of the setting, and its sums.
    Sums(usize, usize, Sums),
}

/// [`Figures`] on a pipe.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Sums {
    positions: u64,
    kl: f64,
    agreements: u64,
    nll: f64,
    dense_nll: f64,
    read: u64,
    dense: u64,
    system_read: u64,
    system_dense: u64,
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
            system_read: f.system_bytes.read,
            system_dense: f.system_bytes.dense,
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
            system_bytes: KvReads {
                read: s.system_read,
                dense: s.system_dense,
            },
            rounds: s.rounds,
            mask_bytes: s.mask_bytes,
        }
    }
}

/// Shares the windows among `jobs` processes of this program.
pub(crate) fn in_processes(
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
