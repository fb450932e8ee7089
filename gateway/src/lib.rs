//! The gateway: the client's API, the tokenizer, the log of committed tokens, and the choice of workers.
//!
//! A request takes this way: `plan` checks it, `opening` finds a verify worker, `session` carries events to the
//! client through `completion` (token ids to text, stop strings) and `delivery` (a bounded buffer), while
//! `attachment` keeps a draft worker on the session for as long as one is to be had. `registry` knows the workers.
//!
//! `openai` is the same API over HTTP, in the shape of OpenAI's.
//!
//! The gateway never sees logits, masks or weights. Speculation is an accelerator: nothing here waits for a draft.

mod args;
mod attachment;
mod completion;
mod delivery;
mod detokenizer;
mod error;
mod generation_service;
mod known_workers;
mod openai;
mod opening;
mod plan;
mod preview;
mod registry;
mod registry_service;
mod session;
mod session_table;
mod stop_strings;
mod tokenizer;

use std::sync::Arc;
use std::time::Duration;

use specattn_proto::limits;
use specattn_proto::v1::generation_service_server::GenerationServiceServer;
use specattn_proto::v1::registry_service_server::RegistryServiceServer;
use specattn_service::server::Server;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use args::{Args, Config, HttpArgs};
pub use error::GatewayError;

use registry::Registry;
use session_table::SessionTable;
use tokenizer::Tokenizer;

/// What the tasks of ended connections get to put things away.
const CLEANUP_TIME: Duration = Duration::from_secs(1);

/// What all requests share.
struct Gateway {
    config: Config,
    tokenizer: Arc<Tokenizer>,
    registry: Arc<Registry>,
    sessions: Arc<SessionTable>,
    /// Session and registration tasks, so that the end of the process can wait for them.
    tasks: TaskTracker,
    /// Cancelled when the drain begins.
    shutdown: CancellationToken,
}

/// Serves the gateway on `listener` until `shutdown` is cancelled and the drain is over.
///
/// # Errors
/// [`GatewayError::Tokenizer`] when the tokenizer cannot be loaded, [`GatewayError::Service`] when serving fails.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    let folder = config.tokenizer_dir.clone();
    let tokenizer = tokio::task::spawn_blocking(move || Tokenizer::load(&folder))
        .await
        .map_err(|error| GatewayError::Task(error.to_string()))??;
    let server_config = config.server.clone();
    let gateway = Arc::new(Gateway {
        registry: Arc::new(Registry::new(tokenizer.hash().to_owned())),
        sessions: Arc::new(SessionTable::new(config.max_sessions)),
        tokenizer: Arc::new(tokenizer),
        tasks: TaskTracker::new(),
        shutdown: shutdown.clone(),
        config,
    });
    known_workers::watch(&gateway);
    tracing::info!(
        listen = listener.local_addr().map(|a| a.to_string()).ok(),
        tokenizer = %gateway.config.tokenizer_dir.display(),
        "gateway is up"
    );

    let generation = GenerationServiceServer::from_arc(Arc::clone(&gateway))
        .max_decoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES);
    let registry = RegistryServiceServer::from_arc(Arc::clone(&gateway))
        .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
    let served = Server::new()
        .with(generation)
        .with(registry)
        .with_http(openai::router(Arc::clone(&gateway))?)
        .serve(listener, &server_config, shutdown)
        .await;

    gateway.tasks.close();
    if tokio::time::timeout(CLEANUP_TIME, gateway.tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(tasks = gateway.tasks.len(), "tasks did not end in time");
    }
    Ok(served?)
}
