//! A gateway between a client and scripted workers, all in one process on free ports.

mod fake_draft;
mod fake_verify;

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use specattn_gateway::Config;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_proto::v1::{
    Finished, GenerateRequest, GenerateResponse, Limits, Mode, ModelInfo, ProvisionalDelta,
    ResumeRequest, Started, StatusRequest, StatusResponse, TokenIds, TokenLogprobs, WorkerRole,
    generate_request::Prompt,
};
use specattn_proto::{Fault, limits};
use specattn_service::channel::{self, Dialer};
use specattn_service::registration;
use specattn_service::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

pub(crate) use fake_draft::FakeDraft;
pub(crate) use fake_verify::{FakeVerify, Script};

/// Longest wait for anything in these tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The bundled target's folder.
pub(crate) fn target_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/target")
}

/// Loaded once: that takes longer than a heartbeat on a busy machine.
pub(crate) fn tokenizer() -> &'static tokenizers::Tokenizer {
    static TOKENIZER: LazyLock<tokenizers::Tokenizer> = LazyLock::new(|| {
        tokenizers::Tokenizer::from_file(target_dir().join("tokenizer.json")).unwrap()
    });
    &TOKENIZER
}

/// Token ids of a text that goes on from another: no begin mark.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, false).unwrap().get_ids().to_vec()
}

/// What the fakes say they run; goes with the bundled tokenizer.
pub(crate) fn model() -> ModelInfo {
    ModelInfo {
        name: "fake".to_owned(),
        vocab_size: 8_192,
        max_context: 1_024,
        eos_token_ids: vec![1],
        ..ModelInfo::default()
    }
}

/// A server that stops when dropped.
pub(crate) struct Running {
    pub(crate) uri: String,
    /// Stops with a drain.
    pub(crate) shutdown: CancellationToken,
    /// Ends registration.
    pub(crate) stopped: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    /// Dies at once: connections break, as after kill -9.
    pub(crate) async fn kill(self) {
        self.stopped.cancel();
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, async {
            while !self.task.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await
            }
        })
        .await
        .unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.stopped.cancel();
    }
}

/// Serves a fake worker; registers it when a gateway is given. Stops without grace.
pub(crate) async fn serve_worker(
    server: Server,
    role: WorkerRole,
    model: ModelInfo,
    gateway: Option<&str>,
) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = ServerConfig {
        drain_timeout: Duration::ZERO,
        ..ServerConfig::default()
    };
    let uri = config.endpoint(&listener).unwrap();
    let (shutdown, stopped) = (CancellationToken::new(), CancellationToken::new());
    if let Some(gateway) = gateway {
        let worker = registration::Worker {
            gateway: gateway.to_owned(),
            dialer: Dialer::default(),
            role,
            endpoint: uri.clone(),
            model,
        };
        tokio::spawn(registration::run(
            worker,
            || specattn_proto::v1::WorkerLoad {
                sessions_max: 8,
                ..Default::default()
            },
            shutdown.clone(),
            stopped.clone(),
        ));
    }
    let token = shutdown.clone();
    let task = tokio::spawn(async move { server.serve(listener, &config, token).await.unwrap() });
    Running {
        uri,
        shutdown,
        stopped,
        task,
    }
}

/// A gateway's configuration with short times.
pub(crate) fn quick_config() -> Config {
    let mut config = Config::new(target_dir());
    config.heartbeat_interval = Duration::from_millis(200);
    config.server.drain_timeout = Duration::from_millis(300);
    config.admission.queue_timeout = Duration::from_millis(300);
    config.reopen_timeout = Duration::from_millis(500);
    config
}

pub(crate) async fn start_gateway(config: Config) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = config.server.endpoint(&listener).unwrap();
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let task = tokio::spawn(async move {
        specattn_gateway::serve(config, listener, token)
            .await
            .unwrap();
    });
    Running {
        uri,
        shutdown,
        stopped: CancellationToken::new(),
        task,
    }
}

/// A client of a gateway.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) generation: GenerationServiceClient<Channel>,
    pub(crate) registry: RegistryServiceClient<Channel>,
}

impl Client {
    pub(crate) async fn new(gateway: &Running) -> Self {
        let channel = channel::connect(&gateway.uri).await.unwrap();
        Self {
            generation: GenerationServiceClient::new(channel.clone())
                .max_encoding_message_size(2 * limits::MAX_SESSION_MESSAGE_BYTES),
            registry: RegistryServiceClient::new(channel),
        }
    }

    pub(crate) async fn status(&mut self) -> StatusResponse {
        self.registry
            .status(StatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Waits until the gateway's status is as wanted.
    pub(crate) async fn wait_for(
        &mut self,
        what: &str,
        wanted: impl Fn(&StatusResponse) -> bool,
    ) -> StatusResponse {
        let waiting = async {
            loop {
                let status = self.status().await;
                if wanted(&status) {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(status) => status,
            Err(_) => panic!("never came: {what}"),
        }
    }

    pub(crate) async fn wait_for_workers(&mut self, count: usize) {
        self.wait_for("workers", |status| status.workers.len() == count)
            .await;
    }

    pub(crate) async fn generate(
        &mut self,
        request: GenerateRequest,
    ) -> Result<Streaming<GenerateResponse>, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.generation.generate(request));
        Ok(answer.await.expect("the gateway answers")?.into_inner())
    }

    pub(crate) async fn resume(
        &mut self,
        session_id: &str,
        from_index: u64,
    ) -> Result<Streaming<GenerateResponse>, Fault> {
        let request = ResumeRequest {
            session_id: session_id.to_owned(),
            from_index,
        };
        let answer = tokio::time::timeout(PATIENCE, self.generation.resume(request));
        let answer = answer.await.expect("the gateway answers");
        answer
            .map(tonic::Response::into_inner)
            .map_err(|status| Fault::from_status(&status))
    }

    /// The fault that a request is refused with.
    pub(crate) async fn refusal(&mut self, request: GenerateRequest) -> Fault {
        match self.generate(request).await {
            Ok(_) => panic!("the request was taken"),
            Err(status) => Fault::from_status(&status),
        }
    }
}

/// A plain request: token ids, greedy, dense, no draft.
pub(crate) fn request(max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![5, 6, 7] })),
        mode: Mode::Dense.into(),
        limits: Some(Limits {
            max_tokens: Some(max_tokens),
            ..Limits::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Everything a client got.
#[derive(Debug, Default)]
pub(crate) struct Received {
    pub(crate) started: Option<Started>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) ahead: Vec<ProvisionalDelta>,
    pub(crate) withdrawn: Vec<u64>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) finished: Option<Finished>,
    pub(crate) fault: Option<Fault>,
}

/// The next event of a stream.
pub(crate) async fn next(stream: &mut Streaming<GenerateResponse>) -> Result<Option<Event>, Fault> {
    let message = tokio::time::timeout(PATIENCE, stream.message())
        .await
        .expect("the stream moves");
    let message = message.map_err(|status| Fault::from_status(&status))?;
    Ok(message.map(|message| message.event.unwrap()))
}

/// Reads a stream to its end, checking its grammar.
pub(crate) async fn read(stream: Streaming<GenerateResponse>) -> Received {
    read_on(stream, Received::default()).await
}

/// Goes on reading after a stream broke.
pub(crate) async fn read_on(
    mut stream: Streaming<GenerateResponse>,
    mut got: Received,
) -> Received {
    let mut streams_started = false;
    loop {
        match next(&mut stream).await {
            Ok(Some(Event::Started(started))) => {
                assert!(!streams_started, "started twice");
                streams_started = true;
                got.started = Some(started);
            }
            Ok(Some(Event::Delta(delta))) => {
                assert!(
                    got.started.is_some() && got.finished.is_none(),
                    "out of order"
                );
                assert_eq!(delta.start, got.tokens.len() as u64);
                assert_eq!(delta.text_start, got.text.len() as u64);
                got.tokens.extend(delta.token_ids);
                got.text.push_str(&delta.text);
                got.logprobs.extend(delta.logprobs);
            }
            Ok(Some(Event::Provisional(ahead))) => {
                assert_eq!(ahead.start, got.tokens.len() as u64);
                got.ahead.push(ahead);
            }
            Ok(Some(Event::Withdrawn(withdrawn))) => got.withdrawn.push(withdrawn.to),
            Ok(Some(Event::Finished(finished))) => {
                assert!(got.finished.is_none(), "finished twice");
                got.finished = Some(finished);
            }
            Ok(None) => return got,
            Err(fault) => {
                got.fault = Some(fault);
                return got;
            }
        }
    }
}
