//! [`Gateway`]: a gateway to call, and what is shown to it.

use clap::Args;
use specattn_proto::Fault;
use specattn_service::Secrets;
use specattn_service::channel::{Dialer, Link};
use specattn_service::security::TlsArgs;

use crate::error::CliError;

/// What is shown to a gateway elsewhere.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Security")]
pub struct ConnectArgs {
    /// API key to show to the gateway; other users of the machine can see command lines, but not the environment
    #[arg(long, value_name = "KEY", env = "SPECATTN_API_KEY", hide_env_values = true, value_parser = Secrets::of)]
    pub api_key: Option<Secrets>,

    /// Certificates, for a gateway at an https URL.
    #[command(flatten)]
    pub tls: TlsArgs,
}

/// See the module's text.
#[derive(Debug, Clone)]
pub struct Gateway {
    url: String,
    dialer: Dialer,
}

impl Gateway {
    /// The gateway at `url`, which is shown what `args` say.
    ///
    /// # Errors
    /// [`CliError::Process`] for a certificate that cannot be used.
    pub fn new(url: &str, args: &ConnectArgs) -> Result<Self, CliError> {
        Ok(Self {
            url: url.to_owned(),
            dialer: Dialer::new(args.tls.load()?, args.api_key.clone()),
        })
    }

    /// A gateway that wants to be shown nothing.
    pub fn open(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            dialer: Dialer::default(),
        }
    }

    /// A link to it, connected now.
    ///
    /// # Errors
    /// [`Fault::Unavailable`] when it does not answer; [`Fault::InvalidArgument`] when the URL is none.
    pub async fn connect(&self) -> Result<Link, Fault> {
        self.dialer.connect(&self.url).await
    }
}
