//! The gateway: the client's API, the tokenizer, the log of committed tokens, and the choice of workers.
//!
//! A request takes this way: `admission` says when, `plan` checks it, `opening` finds a verify worker, `session` follows
//! the worker's events through `completion` (token ids to text, stop strings) and `log` (on file before a client hears of
//! it) into the `transcript`, from which `listener` tells the client, while `attachment` keeps a draft worker on the session
//! for as long as one is to be had. `registry` knows the workers, `verify_search` and `draft_search` say which is asked
//! next; `resuming` takes sessions up from the log. `stepwise` is all of that without a network, for simulations.
//!
//! `openai` is the same API over HTTP, in the shape of OpenAI's. `clients` says who calls, by the keys in `api_keys`, and
//! `key_use` how much of them is used.
//!
//! The gateway never sees logits, masks or weights. Speculation is an accelerator: nothing here waits for a draft.

mod admission;
mod api_keys;
mod args;
mod attachment;
mod clients;
mod completion;
mod console;
mod detokenizer;
mod draft_search;
mod error;
mod generation_service;
mod key_use;
mod known_workers;
mod listener;
mod log;
mod metrics;
mod openai;
mod opening;
mod pass;
mod plan;
mod prefix;
mod recipe;
mod registry;
mod registry_service;
mod resuming;
mod session;
mod session_table;
pub mod stepwise;
mod stop_strings;
mod tally;
mod tokenizer;
mod transcript;
mod verify_link;
mod verify_search;

use std::sync::Arc;
use std::time::Duration;

use specattn_hub::Wanted;
use specattn_proto::limits;
use specattn_proto::v1::generation_service_server::GenerationServiceServer;
use specattn_proto::v1::registry_service_server::RegistryServiceServer;
use specattn_service::guard::Access;
use specattn_service::server::{Listeners, Server};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use admission::AdmissionLimits;
pub use api_keys::{ApiKey, KeyFile, KeyLimits};
pub use args::{Args, Config, HttpArgs};
pub use clients::{AccessArgs, AccessConfig};
pub use error::GatewayError;
pub use log::{Fsync, LogArgs, LogConfig};

use admission::Admission;
use clients::Directory;
use generation_service::Generation;
use log::SessionLog;
use metrics::Metrics;
use registry::{Dialers, Registry};
use session_table::SessionTable;
use tokenizer::Tokenizer;

/// The method of the registry that is not for workers.
const STATUS: &str = "/specattn.v1.RegistryService/Status";

/// What the tasks of ended connections get to put things away.
const CLEANUP_TIME: Duration = Duration::from_secs(1);

/// What all requests share.
struct Gateway {
    config: Config,
    tokenizer: Arc<Tokenizer>,
    registry: Arc<Registry>,
    sessions: Arc<SessionTable>,
    admission: Arc<Admission>,
    log: Option<SessionLog>,
    metrics: Metrics,
    /// Session and registration tasks, so that the end of the process can wait for them.
    tasks: TaskTracker,
    /// Cancelled when the drain begins.
    shutdown: CancellationToken,
}

/// Serves the gateway on `listeners` until `shutdown` is cancelled and the drain is over.
///
/// # Errors
/// [`GatewayError::Hub`] and [`GatewayError::Tokenizer`] when the tokenizer cannot be had, [`GatewayError::Service`] when serving fails.
pub async fn serve(
    mut config: Config,
    listeners: impl Into<Listeners>,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    let given = config.tokenizer_dir.clone();
    let loading = tokio::task::spawn_blocking(move || {
        let folder = specattn_hub::folder(&given, Wanted::Tokenizer)?;
        Ok::<_, GatewayError>((Tokenizer::load(&folder)?, folder))
    });
    let loaded = loading
        .await
        .map_err(|error| GatewayError::Task(error.to_string()))?;
    let tokenizer;
    (tokenizer, config.tokenizer_dir) = loaded?;
    let listeners = listeners.into();
    let server_config = config.server.clone();
    let clients = Arc::new(Directory::new(&config.access));
    let opened = match config.log.clone() {
        Some(log) => {
            specattn_service::shutdown::survive_file_size_limit()?;
            let opened = SessionLog::open_when_there_is_room(log, &shutdown).await?;
            if opened.is_none() {
                return Ok(());
            }
            opened
        }
        None => None,
    };
    let (log, keeper) = opened.unzip();
    let gateway = Arc::new(Gateway {
        registry: Arc::new(Registry::new(
            tokenizer.hash().to_owned(),
            Dialers::new(&config),
        )),
        sessions: Arc::default(),
        admission: Arc::new(Admission::new(config.admission)),
        log,
        metrics: Metrics::default(),
        tokenizer: Arc::new(tokenizer),
        tasks: TaskTracker::new(),
        shutdown: shutdown.clone(),
        config,
    });
    known_workers::watch(&gateway);
    gateway.tasks.spawn(count_places(Arc::clone(&gateway)));
    tracing::info!(
        listen = listeners.public.local_addr().map(|a| a.to_string()).ok(),
        tokenizer = %gateway.config.tokenizer_dir.display(),
        "gateway is up"
    );

    let generation = GenerationServiceServer::new(Generation(Arc::clone(&gateway)))
        .max_decoding_message_size(limits::MAX_SESSION_MESSAGE_BYTES);
    let registry = RegistryServiceServer::from_arc(Arc::clone(&gateway))
        .max_decoding_message_size(limits::MAX_SMALL_MESSAGE_BYTES);
    let served = Server::new()
        .with_clients(clients)
        .with(generation, Access::Clients)
        .with(registry, Access::Peers)
        .method(STATUS, Access::Insiders)
        .with_http(openai::router(Arc::clone(&gateway))?, Access::Clients)
        .with_http(console::page(), Access::Everyone)
        .with_http(console::data(Arc::clone(&gateway)), Access::Operators)
        .with_metrics(metrics::registry(&gateway))
        .serve(listeners, &server_config, shutdown)
        .await;

    gateway.tasks.close();
    if tokio::time::timeout(CLEANUP_TIME, gateway.tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(tasks = gateway.tasks.len(), "tasks did not end in time");
    }
    if let (Some(log), Some(keeper)) = (&gateway.log, keeper) {
        log.close().await;
        let ended = tokio::task::spawn_blocking(move || keeper.join());
        if !matches!(ended.await, Ok(Ok(()))) {
            tracing::error!("the session log's thread failed");
        }
    }
    Ok(served?)
}

/// Tells the admission of the verify workers' places whenever they change.
async fn count_places(gateway: Arc<Gateway>) {
    let mut changes = gateway.registry.changes();
    loop {
        gateway.admission.set_places(gateway.registry.places());
        tokio::select! {
            // The registry is the gateway's, which is held.
            _ = changes.changed() => {}
            () = gateway.shutdown.cancelled() => return,
        }
    }
}
