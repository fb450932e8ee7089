//! `specattn serve`: all three services in one process, until stopped.

use std::io::{self, Write};

use specattn_service::shutdown;

use crate::all_in_one::{AllInOne, Plan};
use crate::args::ServeArgs;
use crate::error::CliError;

/// Runs the command until SIGTERM, SIGINT or the failure of a service.
///
/// # Errors
/// [`CliError::Start`] when a service cannot start or fails later.
pub async fn run(args: &ServeArgs) -> Result<(), CliError> {
    let mut plan = Plan::new(&args.models, !args.no_draft, !args.quiet).await?;
    (plan.server, plan.access) = args.access.config(&args.server)?;
    plan.share_prefixes = !args.no_prefix_sharing;
    plan.http = args.http.clone();
    plan.log = args
        .log
        .config()
        .map_err(|error| CliError::Usage(error.to_string()))?;
    let stop = shutdown::on_signal()?;
    plan.listener = Some(args.server.bind().await?);
    let mut services = tokio::select! {
        started = AllInOne::start(plan) => started?,
        () = stop.cancelled() => return Err(CliError::Interrupted),
    };
    let mut out = io::stdout().lock();
    writeln!(out, "{}", services.gateway())
        .and_then(|()| out.flush())
        .map_err(CliError::Write)?;
    drop(out);
    tokio::select! {
        failure = services.failure() => Err(failure),
        () = stop.cancelled() => {
            services.drain().await
        }
    }
}
