//! Signals: the first SIGTERM or SIGINT starts the drain, a second one ends the process at once. A file that may not grow is
//! a write error like any other.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::error::ServiceError;

/// Exit code after a second signal, as shells report death by SIGINT.
const FORCED_EXIT: i32 = 130;

/// SIGXFSZ, which ends a process that writes beyond its file size limit, unless it is handled.
#[cfg(target_os = "linux")]
const FILE_SIZE_SIGNAL: i32 = 25;

/// Turns a write beyond the process's file size limit into an error of that write. Needs a running Tokio runtime.
///
/// # Errors
/// [`ServiceError::System`] when the handler cannot be installed.
pub fn survive_file_size_limit() -> Result<(), ServiceError> {
    // The handler stays when the stream of its signals is dropped.
    #[cfg(target_os = "linux")]
    drop(
        signal(SignalKind::from_raw(FILE_SIZE_SIGNAL)).map_err(|source| ServiceError::System {
            what: "installing signal handlers",
            source,
        })?,
    );
    Ok(())
}

/// A token that SIGTERM or SIGINT cancels. Needs a running Tokio runtime.
///
/// # Errors
/// [`ServiceError::System`] when the handlers cannot be installed.
pub fn on_signal() -> Result<CancellationToken, ServiceError> {
    let handler = |kind| {
        signal(kind).map_err(|source| ServiceError::System {
            what: "installing signal handlers",
            source,
        })
    };
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if token.is_cancelled() {
                tracing::warn!("second signal: exiting now");
                std::process::exit(FORCED_EXIT);
            }
            tracing::info!("draining; signal again to exit now");
            token.cancel();
        }
    });
    Ok(shutdown)
}
