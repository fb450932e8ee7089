//! [`Directory`]: recognises clients, by API key, by certificate, or not at all where anybody may call.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use axum::http::Extensions;
use axum::response::{IntoResponse, Response};
use specattn_proto::Fault;
use specattn_proto::v1::WorkerRole;
use specattn_service::args::ServerArgs;
use specattn_service::channel::Dialer;
use specattn_service::guard::{Clients, Member, Peers, Shown};
use specattn_service::server::ServerConfig;
use specattn_service::{Secrets, Security, ServiceError, security};

use crate::api_keys::ApiKeys;
use crate::key_use::{KeyRequest, KeyUse};
use crate::openai;

/// Names whose use is remembered before idle ones are forgotten.
const MANY_NAMES: usize = 1_024;

/// Places of the workers' secrets in [`Peers::Secrets`].
const VERIFY: usize = 0;
const DRAFT: usize = 1;

/// Who may use the gateway.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Security")]
pub struct AccessArgs {
    /// File with the hashed API keys of clients and their limits, as specattn key new writes it; changes are taken up
    #[arg(long, value_name = "FILE", env = "SPECATTN_API_KEYS")]
    pub api_keys: Option<PathBuf>,

    /// File with the secret of draft workers, where it is another than that of verify workers in --worker-secret-file
    #[arg(
        long,
        value_name = "FILE",
        requires = "worker_secret_file",
        env = "SPECATTN_DRAFT_SECRET_FILE"
    )]
    pub draft_secret_file: Option<PathBuf>,
}

/// Who may use the gateway, with the files read.
#[derive(Debug, Clone, Default)]
pub struct AccessConfig {
    clients: ClientPolicy,
    draft_secret: Option<Secrets>,
}

/// How clients are recognised.
#[derive(Debug, Clone, Default)]
enum ClientPolicy {
    /// Whoever calls is one.
    #[default]
    Anyone,
    /// By a certificate of the cluster's authority.
    Certified,
    Keys(ApiKeys),
}

impl AccessArgs {
    /// Reads the files: the gateway's server, and who may use it.
    ///
    /// # Errors
    /// [`ServiceError::File`] for one that cannot be used; [`ServiceError::Argument`] where anybody could call.
    pub fn config(&self, args: &ServerArgs) -> Result<(ServerConfig, AccessConfig), ServiceError> {
        let server = args.config()?;
        let security = &server.security;
        let clients = match &self.api_keys {
            Some(path) => ClientPolicy::Keys(ApiKeys::load(path)?),
            None if security.is_mutual() => ClientPolicy::Certified,
            None if security.trusts_callers_at(args.listen) => ClientPolicy::Anyone,
            None => {
                let credentials = "--api-keys, or --mutual-tls";
                return Err(security::exposed(args.listen, credentials));
            }
        };
        let draft_secret = self.draft_secret_file.as_deref().map(Secrets::load);
        let access = AccessConfig {
            clients,
            draft_secret: draft_secret.transpose()?,
        };
        let secrets = security.secret.clone().map_or_else(Vec::new, |verify| {
            let draft = access.draft_secret.clone();
            let draft = draft.unwrap_or_else(|| verify.clone());
            // By VERIFY and DRAFT.
            vec![verify, draft]
        });
        let peers = security.peers(args.listen, secrets);
        Ok((ServerConfig { peers, ..server }, access))
    }
}

impl AccessConfig {
    /// The secrets by which a gateway's own process runs a verify and a draft worker: those that are configured, or one made
    /// for the purpose; none where anybody may be a worker.
    pub fn own_workers(&self, server: &mut ServerConfig) -> Option<(Secrets, Secrets)> {
        match &server.peers {
            Peers::Anyone => return None,
            Peers::Secrets(secrets) if secrets.len() > DRAFT => {
                return Some((secrets[VERIFY].clone(), secrets[DRAFT].clone()));
            }
            Peers::Secrets(_) | Peers::Certified | Peers::Nobody => {}
        }
        let bits: [u128; 2] = rand::random();
        let made = Secrets::of(&format!("{:032x}{:032x}", bits[0], bits[1]))
            .expect("64 hex digits are a secret");
        server.security.secret = Some(made.clone());
        server.peers = Peers::Secrets(vec![made.clone(), made.clone()]);
        Some((made.clone(), made))
    }

    /// How workers of a role are called.
    pub(crate) fn dialer(&self, security: &Security, role: WorkerRole) -> Dialer {
        match (role, &self.draft_secret) {
            (WorkerRole::Draft, Some(secret)) => {
                Dialer::new(security.tls.clone(), Some(secret.clone()))
            }
            _ => security.dialer(),
        }
    }
}

/// Whether a recognised part of the cluster may register in a role.
pub(crate) fn may_register(member: Option<&Member>, role: WorkerRole) -> Result<(), Fault> {
    let index = if role == WorkerRole::Draft {
        DRAFT
    } else {
        VERIFY
    };
    if member.is_some_and(|member| member.holds(index)) {
        return Ok(());
    }
    Err(Fault::PermissionDenied(format!(
        "the secret is not that of a {} worker",
        if index == DRAFT { "draft" } else { "verify" }
    )))
}

/// A recognised client, in a request's extensions.
#[derive(Debug, Clone)]
pub(crate) struct KnownClient {
    /// The API key's name; `None` where clients have none.
    pub(crate) name: Option<Arc<str>>,
    operator: bool,
    key_use: Option<Arc<KeyUse>>,
}

impl KnownClient {
    /// One without a key, where none is wanted.
    pub(crate) fn anyone() -> Self {
        Self {
            name: None,
            operator: true,
            key_use: None,
        }
    }

    /// Of the caller of a request that the guard let in.
    pub(crate) fn of(extensions: &Extensions) -> Result<Self, Fault> {
        let client = extensions.get::<Self>().cloned();
        client.ok_or_else(|| Fault::Unauthenticated("the client is not known".to_owned()))
    }

    /// Whether a session of `owner` is this client's to reach. Others are told that it does not exist.
    pub(crate) fn may_reach(&self, owner: &str) -> bool {
        self.operator || self.name.as_deref() == Some(owner)
    }

    /// Begins a request, if its key lets it.
    ///
    /// # Errors
    /// [`Fault::ResourceExhausted`] when the key is at a limit.
    pub(crate) fn begin(&self) -> Result<Option<KeyRequest>, Fault> {
        let key_use = self.key_use.as_ref();
        key_use.map(|key| key.begin(Instant::now())).transpose()
    }

    /// Whose a session that it begins is; empty where clients have no keys.
    pub(crate) fn owner(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }
}

/// See the module's text.
pub(crate) struct Directory {
    policy: ClientPolicy,
    uses: Mutex<HashMap<Arc<str>, Arc<KeyUse>>>,
}

impl Directory {
    pub(crate) fn new(config: &AccessConfig) -> Self {
        Self {
            policy: config.clients.clone(),
            uses: Mutex::default(),
        }
    }

    fn with_key(&self, keys: &ApiKeys, shown: Shown<'_>) -> Result<KnownClient, Fault> {
        let refused = |reason: &str| Fault::Unauthenticated(reason.to_owned());
        let text = shown
            .bearer
            .ok_or_else(|| refused("an API key is wanted, as Bearer token in authorization"))?;
        let key = keys.find(text, SystemTime::now()).map_err(refused)?;
        let now = Instant::now();
        // No code panics while it holds the lock halfway through a change.
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        if uses.len() >= MANY_NAMES && !uses.contains_key(&key.name) {
            uses.retain(|_, key| Arc::strong_count(key) > 1 || !key.is_idle(now));
        }
        let key_use = uses
            .entry(Arc::clone(&key.name))
            .or_insert_with(|| Arc::new(KeyUse::new(key.limits, now)));
        key_use.set_limits(key.limits, now);
        Ok(KnownClient {
            name: Some(Arc::clone(&key.name)),
            operator: key.operator,
            key_use: Some(Arc::clone(key_use)),
        })
    }
}

impl Clients for Directory {
    fn recognise(&self, shown: Shown<'_>, extensions: &mut Extensions) -> Result<bool, Fault> {
        let client = match &self.policy {
            ClientPolicy::Anyone => KnownClient::anyone(),
            ClientPolicy::Certified if shown.certified => KnownClient::anyone(),
            ClientPolicy::Certified => {
                let reason = "a certificate of the cluster is wanted".to_owned();
                return Err(Fault::Unauthenticated(reason));
            }
            ClientPolicy::Keys(keys) => self.with_key(keys, shown)?,
        };
        let operator = client.operator;
        extensions.insert(client);
        Ok(operator)
    }

    fn refusal(&self, fault: Fault) -> Response {
        openai::ApiError::from(fault).into_response()
    }
}
