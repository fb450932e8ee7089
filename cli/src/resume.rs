//! `specattn resume`: the rest of a session that lost its client or its gateway.

use specattn_service::shutdown;

use crate::args::ResumeArgs;
use crate::connect::Gateway;
use crate::error::CliError;
use crate::generate::conclude;
use crate::session::Session;

/// Runs the command; gives the exit code.
///
/// # Errors
/// Any [`CliError`].
pub async fn run(args: &ResumeArgs) -> Result<u8, CliError> {
    let interrupt = shutdown::on_signal()?;
    let id = args.session_id.clone();
    let gateway = Gateway::new(&args.gateway.url, &args.gateway.connect)?;
    let resuming = Session::resumed(&gateway, id, args.from, !args.json);
    let session = tokio::select! {
        session = resuming => session?,
        () = interrupt.cancelled() => return Err(CliError::Interrupted),
    };
    let report = session.report(&interrupt).await?;
    conclude(&report, args.json, args.quiet, &interrupt)
}
