//! [`Stranger`]: a draft worker of the test's own making, which follows the protocol only as far as the test wants.

use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{
    Join, ModelInfo, Propose, SpeculateRequest, SpeculateResponse, Verdict, Welcome,
    speculate_request, speculate_response,
};
use specattn_proto::version::PROTOCOL_VERSION;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::session::capability;
use crate::soon;

/// A link to a session, with what it knows of the session's state.
#[derive(Debug)]
pub struct Stranger {
    requests: mpsc::Sender<SpeculateRequest>,
    responses: Streaming<SpeculateResponse>,
    /// What the verify worker said first.
    pub welcome: Welcome,
    /// The session's epoch, as far as told.
    pub epoch: u64,
    /// All tokens of the session, as far as told.
    pub tokens: Vec<u32>,
    sequence: u64,
}

/// The bundled draft's shape, as its own worker would state it, without hashes.
pub fn model_info() -> ModelInfo {
    ModelInfo {
        name: "stranger".to_owned(),
        vocab_size: 8_192,
        max_context: 8_192,
        num_layers: 3,
        num_heads: 3,
        num_kv_heads: 1,
        head_dim: 64,
        ..ModelInfo::default()
    }
}

/// A Join of session `id` by a draft that knows the first `known` tokens.
pub fn join(id: &str, known: usize) -> Join {
    Join {
        session_id: id.to_owned(),
        draft_model: Some(model_info()),
        known_tokens: known as u64,
        capability: capability(),
        protocol_version: PROTOCOL_VERSION,
    }
}

/// Wraps a Join.
pub fn join_request(join: Join) -> SpeculateRequest {
    SpeculateRequest {
        message: Some(speculate_request::Message::Join(join)),
    }
}

/// Wraps a Propose.
pub fn propose_request(propose: Propose) -> SpeculateRequest {
    SpeculateRequest {
        message: Some(speculate_request::Message::Propose(propose)),
    }
}

impl Stranger {
    /// Joins a session whose first tokens are `known`.
    pub async fn join(channel: Channel, id: &str, known: &[u32]) -> Result<Self, Status> {
        Self::join_with(channel, join(id, known.len()), known).await
    }

    /// Joins by the given message.
    pub async fn join_with(channel: Channel, join: Join, known: &[u32]) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(64);
        requests
            .try_send(join_request(join))
            .expect("a fresh channel has room");
        let mut client = VerifyServiceClient::new(channel).max_encoding_message_size(usize::MAX);
        let answer = soon("Speculate", client.speculate(ReceiverStream::new(receiver))).await?;
        let mut responses = answer.into_inner();
        let first = soon("Welcome", responses.message())
            .await?
            .and_then(|r| r.message);
        let Some(speculate_response::Message::Welcome(welcome)) = first else {
            panic!("{first:?} in place of Welcome");
        };
        assert_eq!(welcome.start, known.len() as u64);
        Ok(Self {
            requests,
            responses,
            epoch: welcome.epoch,
            tokens: [known, &welcome.token_ids].concat(),
            welcome,
            sequence: 0,
        })
    }

    /// A proposal that fits the session's state as far as told.
    pub fn proposal(&mut self, tokens: &[u32]) -> Propose {
        self.sequence += 1;
        Propose {
            epoch: self.epoch,
            base: self.tokens.len() as u64,
            sequence: self.sequence,
            token_ids: tokens.to_vec(),
            pending_token: *self.tokens.last().expect("a session has tokens"),
            last: true,
            ..Propose::default()
        }
    }

    /// Sends a proposal; false when the stream is closed.
    pub async fn send(&self, propose: Propose) -> bool {
        soon("sending", self.requests.send(propose_request(propose)))
            .await
            .is_ok()
    }

    /// Sends any message.
    pub async fn send_any(&self, request: SpeculateRequest) -> bool {
        soon("sending", self.requests.send(request)).await.is_ok()
    }

    /// The next verdict, taken note of unless it answers a proposal that was judged; `None` once the session is over.
    ///
    /// # Errors
    /// The status that ended the link.
    pub async fn verdict(&mut self) -> Result<Option<Verdict>, Status> {
        let response = soon("an answer", self.responses.message()).await?;
        match response.and_then(|response| response.message) {
            Some(speculate_response::Message::Verdict(verdict)) => {
                self.epoch = verdict.epoch;
                if !verdict.judged {
                    self.tokens.truncate(verdict.base as usize);
                    self.tokens.extend(&verdict.next_tokens);
                }
                Ok(Some(verdict))
            }
            Some(speculate_response::Message::Closed(_)) | None => Ok(None),
            Some(other) => panic!("unexpected {other:?}"),
        }
    }

    /// The next verdict, if one comes at once; else as [`Stranger::verdict`].
    pub async fn verdict_now(&mut self) -> Option<Result<Option<Verdict>, Status>> {
        let moment = std::time::Duration::from_millis(1);
        // Reading a message is safe to give up: what has not come yet stays in the stream.
        tokio::time::timeout(moment, self.verdict()).await.ok()
    }

    /// Sends what `make` makes of a fitting proposal until the verify worker has judged one of them or ended the link,
    /// since those that it gets too late are stale.
    ///
    /// # Errors
    /// The status that ended the link.
    pub async fn insist(
        &mut self,
        tokens: &[u32],
        mut make: impl FnMut(Propose) -> Propose,
    ) -> Result<Option<Verdict>, Status> {
        loop {
            let propose = make(self.proposal(tokens));
            let sequence = self.sequence;
            self.send(propose).await;
            // Progress is told unasked: one proposal for each verdict would soon be a flood.
            let mut next = Some(self.verdict().await);
            while let Some(verdict) = next {
                match verdict? {
                    None => return Ok(None),
                    Some(verdict) if verdict.judged => {
                        self.note(tokens, &verdict);
                        return Ok(Some(verdict));
                    }
                    // Progress, or the stale answer: the state is known again.
                    Some(_) => next = self.verdict_now().await,
                }
            }
            assert!(sequence < 1_000_000, "no proposal was ever judged");
        }
    }

    /// Takes note of a judged proposal of `tokens`.
    pub fn note(&mut self, tokens: &[u32], verdict: &Verdict) {
        assert_eq!(verdict.base, self.tokens.len() as u64);
        self.tokens.extend(&tokens[..verdict.accepted as usize]);
        self.tokens.extend(&verdict.next_tokens);
    }
}
