//! `specattn key`: API keys for clients, and the secret that gateway and workers share.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use specattn_gateway::{ApiKey, KeyFile, KeyLimits};

use crate::error::CliError;
use crate::generate::write_out;

/// `specattn key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// What to make.
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// What can be made.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make an API key for a client
    #[command(long_about = "Make an API key for a client.\n\n\
            Prints the key, which is kept nowhere. Its hash and limits go into the file of --api-keys, which a running \
            gateway reads again by itself; without the option the entry to put there is printed on standard error. A key is \
            withdrawn by taking its entry away.")]
    New(NewKeyArgs),
    /// Make a secret for --worker-secret-file
    Secret,
}

/// `specattn key new`.
#[derive(Debug, Args)]
pub struct NewKeyArgs {
    /// Whose it is: letters, digits, '.', '_', '-' and '@'. Sessions belong to a name, whichever of its keys began them
    #[arg(value_name = "NAME")]
    pub name: String,

    /// File to add the key to; it is made where there is none
    #[arg(long, value_name = "FILE", env = "SPECATTN_API_KEYS")]
    pub api_keys: Option<PathBuf>,

    /// Most requests a minute
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub requests_per_minute: Option<u32>,

    /// Most requests at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub concurrent_requests: Option<u32>,

    /// Most tokens a minute, of prompts and completions
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tokens_per_minute: Option<u32>,

    /// Days after which the key is refused
    #[arg(long, value_name = "DAYS")]
    pub expires_days: Option<u32>,

    /// Let the key see all sessions and workers, and read metrics
    #[arg(long)]
    pub operator: bool,
}

/// Runs the command.
///
/// # Errors
/// [`CliError::Usage`] for a name or a file that cannot be used, [`CliError::Write`].
pub fn run(args: &KeyArgs) -> Result<(), CliError> {
    match &args.command {
        KeyCommand::New(args) => new(args),
        KeyCommand::Secret => {
            let bits: [u128; 2] = rand::random();
            write_out(format!("{:032x}{:032x}\n", bits[0], bits[1]).as_bytes())
        }
    }
}

fn new(args: &NewKeyArgs) -> Result<(), CliError> {
    let (mut key, text) = ApiKey::generate(&args.name)
        .map_err(|reason| CliError::Usage(format!("the key {reason}")))?;
    key.operator = args.operator;
    key.limits = KeyLimits {
        requests_per_minute: args.requests_per_minute,
        concurrent_requests: args.concurrent_requests,
        tokens_per_minute: args.tokens_per_minute,
    };
    key.expires = args.expires_days.map(|days| {
        let after = Duration::from_secs(u64::from(days) * 24 * 3_600);
        humantime::format_rfc3339_seconds(SystemTime::now() + after).to_string()
    });
    let entry = serde_json::to_string(&key).map_err(|error| CliError::Write(error.into()))?;
    match &args.api_keys {
        Some(path) => add(path, key)?,
        None => eprintln!("{entry}"),
    }
    write_out(format!("{text}\n").as_bytes())
}

/// Adds a key to a file, in one step: whoever reads it meanwhile finds the one or the other.
fn add(path: &Path, key: ApiKey) -> Result<(), CliError> {
    let unusable = |reason: String| CliError::Usage(format!("{}: {reason}", path.display()));
    let mut file = match fs::read(path) {
        Ok(text) => KeyFile::parse(&text).map_err(unusable)?,
        Err(error) if error.kind() == ErrorKind::NotFound => KeyFile::default(),
        Err(error) => return Err(unusable(error.to_string())),
    };
    file.keys.push(key);
    let text =
        serde_json::to_string_pretty(&file).map_err(|error| CliError::Write(error.into()))?;
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let mut next = tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new(".")))
        .map_err(|error| unusable(error.to_string()))?;
    // The file holds no secret; the gateway may run as another user.
    let mode = fs::metadata(path).map_or(0o644, |before| before.permissions().mode());
    let written = next
        .write_all(text.as_bytes())
        .and_then(|()| next.write_all(b"\n"))
        .and_then(|()| {
            next.as_file()
                .set_permissions(fs::Permissions::from_mode(mode))
        })
        .and_then(|()| next.as_file().sync_all());
    written.map_err(|error| unusable(error.to_string()))?;
    next.persist(path)
        .map_err(|error| unusable(error.to_string()))?;
    Ok(())
}
