//! The command line, and the checked configuration made of it.

use clap::{Args as ClapArgs, Parser};
use specattn_engine::sampling::MAX_DRAFT_ENTRIES;
use specattn_service::ServiceError;
use specattn_service::args::{RegistrationArgs, ServerArgs, TelemetryArgs};
use specattn_service::server::ServerConfig;
use specattn_worker::args::{IoArgs, ModelArgs, ModelConfig};

/// SpecAttn draft worker: runs the draft model, proposes tokens and selects what the target attends to
#[derive(Debug, Clone, Parser)]
#[command(name = "specattn-draft", version)]
pub struct Args {
    /// The draft model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Proposals.
    #[command(flatten)]
    pub drafting: DraftingArgs,
    /// Where to listen.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Threads of the server.
    #[command(flatten)]
    pub io: IoArgs,
    /// Where to register.
    #[command(flatten)]
    pub registration: RegistrationArgs,
    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// How proposals are made.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Drafting")]
pub struct DraftingArgs {
    /// Most entries of the distribution sent with a sampled draft token: more raise acceptance a little, and the bytes
    /// of a round; at most 1,024
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_q_entries: usize,
}

/// A draft worker's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The draft model.
    pub model: ModelConfig,
    /// Most entries of a draft token's distribution.
    pub max_q_entries: usize,
    /// The server.
    pub server: ServerConfig,
    /// The gateway to register with.
    pub gateway: Option<String>,
}

impl Args {
    /// Checks the arguments.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] names the one that is out of range.
    pub fn config(&self) -> Result<Config, ServiceError> {
        let max_q_entries = self.drafting.max_q_entries;
        if !(1..=MAX_DRAFT_ENTRIES).contains(&max_q_entries) {
            return Err(ServiceError::Argument {
                argument: "--max-q-entries",
                reason: format!("must be from 1 to {MAX_DRAFT_ENTRIES}"),
            });
        }
        Ok(Config {
            model: self.model.config()?,
            max_q_entries,
            server: self.server.config()?,
            gateway: self.registration.config()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use specattn_service::args::{Service, command, parse_from};

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        command::<Args>(Service::Draft).debug_assert();
        let parse = |entries| -> Args {
            parse_from(
                Service::Draft,
                ["x", "--model", "m", "--max-q-entries", entries],
            )
            .unwrap()
        };
        assert_eq!(parse("7").config().unwrap().max_q_entries, 7);
        for bad in ["0", "1025"] {
            assert_eq!(parse(bad).config().unwrap_err().label(), "argument");
        }
    }
}
