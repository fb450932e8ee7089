//! The command line, and the checked configuration made of it.

use clap::{Args as ClapArgs, Parser, ValueEnum};
use specattn_engine::sampling::MAX_DRAFT_ENTRIES;
use specattn_service::ServiceError;
use specattn_service::args::{RegistrationArgs, ServerArgs, TelemetryArgs, TraceArgs};
use specattn_service::server::ServerConfig;
use specattn_worker::args::{IoArgs, ModelArgs, ModelConfig};

use crate::own_reads::OwnPolicy;

/// SpecAttn draft worker: runs the draft model, proposes tokens and selects what the target attends to
#[derive(Debug, Clone, Parser)]
#[command(name = "specattn-draft", version = specattn_proto::version::build())]
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
    /// Where traces go.
    #[command(flatten)]
    pub traces: TraceArgs,
}

/// How proposals are made.
#[derive(Debug, Clone, ClapArgs)]
#[command(next_help_heading = "Drafting")]
pub struct DraftingArgs {
    /// Most entries of the distribution sent with a sampled draft token: more raise acceptance a little, and the bytes
    /// of a round; at most 1,024
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_q_entries: usize,

    /// Capture attention at least every so many draft steps: those steps read all of the draft's KV cache and renew masks,
    /// the others read what the draft itself last found heavy; 1 captures every step
    #[arg(long, value_name = "STEPS", default_value_t = OwnPolicy::default().capture_every)]
    pub capture_every: usize,

    /// Attention mass that the draft's own reads must keep between captured steps, in (0, 1]
    #[arg(long, value_name = "P", default_value_t = OwnPolicy::default().p)]
    pub own_p: f32,

    /// Draft ahead while a verdict is out: never, always, always and without making the target wait where guesses failed, or as
    /// is measured to be fastest
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = LookaheadMode::Auto)]
    pub lookahead: LookaheadMode,
}

/// Whether to draft on, along guesses, while a verdict is out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LookaheadMode {
    /// as is measured to be fastest
    Auto,
    /// always
    On,
    /// always, and the target steps alone where no guess came true; as `on` in modes with masks
    Unawaited,
    /// never
    Off,
}

/// How proposals are made, checked.
#[derive(Debug, Clone, Copy)]
pub struct Drafting {
    /// Most entries of a draft token's distribution.
    pub max_q_entries: usize,
    /// What the draft reads of its own KV cache.
    pub own: OwnPolicy,
    /// Whether to run ahead of verdicts.
    pub lookahead: LookaheadMode,
}

/// A draft worker's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// The draft model.
    pub model: ModelConfig,
    /// How proposals are made.
    pub drafting: Drafting,
    /// The server.
    pub server: ServerConfig,
    /// The gateway to register with.
    pub gateway: Option<String>,
}

impl DraftingArgs {
    fn check(&self) -> Result<Drafting, ServiceError> {
        let refuse = |argument, reason: String| Err(ServiceError::Argument { argument, reason });
        if !(1..=MAX_DRAFT_ENTRIES).contains(&self.max_q_entries) {
            let reason = format!("must be from 1 to {MAX_DRAFT_ENTRIES}");
            return refuse("--max-q-entries", reason);
        }
        if self.capture_every == 0 {
            return refuse("--capture-every", "must be at least 1".to_owned());
        }
        if !(self.own_p > 0.0 && self.own_p <= 1.0) {
            return refuse("--own-p", "must be in (0, 1]".to_owned());
        }
        Ok(Drafting {
            max_q_entries: self.max_q_entries,
            own: OwnPolicy {
                capture_every: self.capture_every,
                p: self.own_p,
            },
            lookahead: self.lookahead,
        })
    }
}

impl Args {
    /// Checks the arguments.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] names the one that is out of range.
    pub fn config(&self) -> Result<Config, ServiceError> {
        Ok(Config {
            model: self.model.config()?,
            drafting: self.drafting.check()?,
            server: self.server.worker_config()?,
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
        let parse = |flag, value| -> Args {
            parse_from(Service::Draft, ["x", "--model", "m", flag, value]).unwrap()
        };
        let good = parse("--max-q-entries", "7").config().unwrap();
        assert_eq!(good.drafting.max_q_entries, 7);
        let bad = [
            ("--max-q-entries", "0"),
            ("--max-q-entries", "1025"),
            ("--capture-every", "0"),
            ("--own-p", "0"),
            ("--own-p", "1.5"),
            ("--own-p", "NaN"),
        ];
        for (flag, value) in bad {
            let error = parse(flag, value).config().unwrap_err();
            assert_eq!(error.label(), "argument", "{flag} {value}");
        }
    }
}
