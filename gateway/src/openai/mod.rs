//! The OpenAI-compatible HTTP API, on the same port as gRPC.
//!
//! A request takes this way: `request` reads its fields, `prompt` and `chat_template` make token ids of what it asks
//! about, and each choice becomes one session of `GenerationService`, started in this process; `answer` words what comes
//! back, at once or through `stream` as server-sent events. Nothing is decided here: limits, defaults and failures are
//! those of the gRPC API, and `error` puts them into OpenAI's shape.

mod answer;
mod chat_template;
mod error;
mod logprobs;
mod prompt;
mod request;
mod stream;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request, State};
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use specattn_proto::{Fault, limits};
use specattn_service::trace::Parent;
use tonic::transport::server::TcpConnectInfo;

use crate::Gateway;
use crate::admission::ClientKey;
use crate::clients::KnownClient;
use crate::error::GatewayError;
use crate::generation_service::Caller;
use crate::registry::Prefix;
use answer::Wording;
use chat_template::ChatTemplate;
pub(crate) use error::ApiError;
use request::{ChatRequest, CompletionRequest, Generation};

/// What a caller gets to send a request's body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Most choices of a request: prompts times `n`.
const MAX_CHOICES: usize = 128;

/// Who sent a request. This API has no way to come back to a session, so a client that leaves ends it.
struct Peer(Caller);

impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let connection = parts.extensions.get::<TcpConnectInfo>();
        let address = connection.and_then(TcpConnectInfo::remote_addr);
        let address = address.map(|address| address.ip());
        let client = KnownClient::of(&parts.extensions)?;
        Ok(Self(Caller {
            line: ClientKey::of(&client, &parts.headers, address),
            client,
            linger: Duration::ZERO,
            trace: Parent::of(&parts.headers),
        }))
    }
}

/// A request's JSON body, which its caller may not take for ever to send.
struct Timely<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Timely<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let reading = Json::<T>::from_request(request, state);
        match tokio::time::timeout(BODY_TIMEOUT, reading).await {
            Ok(Ok(Json(body))) => Ok(Self(body)),
            Ok(Err(rejection)) => Err(rejection.into()),
            Err(_) => Err(ApiError::late()),
        }
    }
}

/// What the handlers share.
struct Api {
    gateway: Arc<Gateway>,
    template: Option<Arc<ChatTemplate>>,
}

/// The routes under `/v1`.
///
/// # Errors
/// [`GatewayError::ChatTemplate`] when `--chat-template` names no readable template.
pub(crate) fn router(gateway: Arc<Gateway>) -> Result<Router, GatewayError> {
    let template = ChatTemplate::find(&gateway.config)?.map(Arc::new);
    let api = Arc::new(Api { gateway, template });
    Ok(Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/{*rest}", axum::routing::any(no_such_path))
        .layer(DefaultBodyLimit::max(limits::MAX_SESSION_MESSAGE_BYTES))
        .with_state(api))
}

async fn completions(
    State(api): State<Arc<Api>>,
    Peer(caller): Peer,
    Timely(request): Timely<CompletionRequest>,
) -> Result<Response, ApiError> {
    let model = api.model_named(request.common.model.as_deref())?;
    let (prompts, generation) = request.into_parts()?;
    let wording = Wording::completion(model, &generation);
    api.answer(wording, prompts, generation, caller).await
}

async fn chat_completions(
    State(api): State<Arc<Api>>,
    Peer(caller): Peer,
    Timely(request): Timely<ChatRequest>,
) -> Result<Response, ApiError> {
    let model = api.model_named(request.common.model.as_deref())?;
    let (conversation, generation) = request.into_parts()?;
    let Some(template) = api.template.clone() else {
        return Err(ApiError::invalid(
            "messages",
            "this model has no chat template: use /v1/completions, or start the gateway with --chat-template",
        ));
    };
    let tokenizer = Arc::clone(&api.gateway.tokenizer);
    let prompt = tokio::task::spawn_blocking(move || {
        prompt::of_conversation(&conversation, &template, &tokenizer)
    })
    .await
    .map_err(|error| Fault::Internal(format!("rendering the conversation failed: {error}")))??;
    let wording = Wording::chat(model, &generation);
    api.answer(wording, vec![prompt], generation, caller).await
}

async fn models(State(api): State<Arc<Api>>) -> Json<Value> {
    let list: Vec<Value> = api
        .model_names()
        .iter()
        .map(|name| model_card(name))
        .collect();
    Json(json!({"object": "list", "data": list}))
}

async fn model(
    State(api): State<Arc<Api>>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(model_card(&api.model_named(Some(&name))?)))
}

async fn no_such_path() -> ApiError {
    Fault::NotFound("no such path in this API".to_owned()).into()
}

fn model_card(name: &str) -> Value {
    json!({"id": name, "object": "model", "created": 0, "owned_by": "specattn"})
}

impl Api {
    /// Names that requests may ask for: those given on the command line, else those of the verify workers' checkpoints.
    fn model_names(&self) -> Vec<String> {
        let given = &self.gateway.config.http.served_model_name;
        if !given.is_empty() {
            return given.clone();
        }
        let workers = self.gateway.registry.verify_candidates(&Prefix::of(&[]));
        let mut names: Vec<_> = workers
            .iter()
            .map(|worker| worker.model.name.clone())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    /// The model that a request means; one without a name means the first.
    fn model_named(&self, name: Option<&str>) -> Result<String, ApiError> {
        let names = self.model_names();
        match name {
            Some(name) if names.iter().any(|known| known == name) => Ok(name.to_owned()),
            // Before any worker is there nothing can be said of names: the session's own error tells more.
            Some(name) if names.is_empty() => Ok(name.to_owned()),
            Some(name) => Err(ApiError::unknown_model(name, &names)),
            None => Ok(names.into_iter().next().unwrap_or_default()),
        }
    }

    /// Runs every choice as a session of its own.
    async fn answer(
        self: Arc<Self>,
        wording: Wording,
        prompts: Vec<prompt::Prompt>,
        generation: Generation,
        caller: Caller,
    ) -> Result<Response, ApiError> {
        let count = prompts.len().saturating_mul(generation.choices_per_prompt);
        if count == 0 || count > MAX_CHOICES {
            let reason =
                format!("{count} choices asked for; between 1 and {MAX_CHOICES} are possible");
            return Err(ApiError::invalid("n", reason));
        }
        let mut requests = Vec::with_capacity(count);
        let mut echoes = Vec::with_capacity(count);
        for prompt in &prompts {
            for choice in 0..generation.choices_per_prompt {
                requests.push(generation.request(prompt, choice));
                echoes.push(if generation.echo {
                    prompt.text(&self.gateway.tokenizer)?
                } else {
                    String::new()
                });
            }
        }
        let opening = requests
            .into_iter()
            .map(|request| self.gateway.generate(request, caller.clone()));
        let streams = futures_util::future::try_join_all(opening).await?;
        let tokenizer = Arc::clone(&self.gateway.tokenizer);
        if generation.stream {
            Ok(stream::events(wording, streams, echoes, tokenizer).into_response())
        } else {
            let answer = answer::collect(wording, streams, echoes, tokenizer).await?;
            Ok(Json(answer).into_response())
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}
