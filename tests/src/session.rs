//! [`Session`]: a session opened at a verify worker directly, with the test in the gateway's place.

use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{
    AttachRequest, AttachResponse, DraftPolicy, FinishReason, Limits, MaskPolicy, Mode,
    OpenRequest, OpenResponse, Sampling, SessionStats, attach_response, open_response,
};
use specattn_proto::version::PROTOCOL_VERSION;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::soon;

/// What drafts must show to join the sessions of tests.
pub fn capability() -> Vec<u8> {
    (0..32).collect()
}

/// A greedy dense `OpenRequest` of a session that nobody else has, to change to taste.
pub fn open_request(prompt: &[u32], max_tokens: u32) -> OpenRequest {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    OpenRequest {
        session_id: format!("{:08x}{:024x}", std::process::id(), number),
        token_ids: prompt.to_vec(),
        prompt_tokens: prompt.len() as u32,
        sampling: Some(Sampling::default()),
        limits: Some(Limits {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..Limits::default()
        }),
        mode: Mode::Dense.into(),
        mask: Some(MaskPolicy {
            mask_p: Some(0.95),
            sink_tokens: Some(4),
            window_tokens: Some(64),
            granularity: Some(1),
        }),
        draft_length: 4,
        draft_while_it_pays: false,
        check: None,
        provisional: false,
        draft_capability: capability(),
        protocol_version: PROTOCOL_VERSION,
    }
}

/// A running session. Dropping it ends it.
#[derive(Debug)]
pub struct Session {
    request: OpenRequest,
    events: Streaming<OpenResponse>,
    /// Committed tokens after the prompt.
    pub tokens: Vec<u32>,
    /// How it ended and what it cost.
    pub end: Option<(FinishReason, SessionStats)>,
}

impl Session {
    /// Opens a session and waits for Opened.
    pub async fn open(channel: Channel, request: OpenRequest) -> Result<Self, Status> {
        let mut client = VerifyServiceClient::new(channel);
        let response = soon("Open", client.open(request.clone())).await?;
        let mut events = response.into_inner();
        let first = soon("Opened", events.message())
            .await?
            .and_then(|r| r.event);
        assert!(
            matches!(first, Some(open_response::Event::Opened(_))),
            "{first:?}"
        );
        Ok(Self {
            request,
            events,
            tokens: Vec::new(),
            end: None,
        })
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.request.session_id
    }

    /// Lets the draft worker behind `channel` draft for it, reaching the verify worker at `endpoint`.
    pub async fn attach(&self, channel: Channel, endpoint: &str) -> Result<Attachment, Status> {
        let request = AttachRequest {
            session_id: self.id().to_owned(),
            verify_endpoint: endpoint.to_owned(),
            token_ids: self.request.token_ids.clone(),
            policy: Some(DraftPolicy {
                draft_length: Some(self.request.draft_length),
                ..DraftPolicy::default()
            }),
            max_tokens_total: self.limit() as u64,
            capability: self.request.draft_capability.clone(),
            protocol_version: PROTOCOL_VERSION,
        };
        let mut client = DraftServiceClient::new(channel);
        let mut events = soon("Attach", client.attach(request)).await?.into_inner();
        let first = soon("Attached", events.message())
            .await?
            .and_then(|r| r.event);
        assert!(
            matches!(first, Some(attach_response::Event::Attached(_))),
            "{first:?}"
        );
        Ok(Attachment { events })
    }

    fn limit(&self) -> usize {
        let limits = self.request.limits.as_ref();
        let most = limits
            .and_then(|limits| limits.max_tokens)
            .expect("sessions of tests are limited");
        self.request.prompt_tokens as usize + most as usize
    }

    /// Takes the next event; false at the end.
    pub async fn next(&mut self) -> Result<bool, Status> {
        let response = soon("an event", self.events.message()).await?;
        match response.and_then(|response| response.event) {
            Some(open_response::Event::Committed(committed)) => {
                let known = self.request.token_ids.len() + self.tokens.len();
                assert_eq!(committed.start, known as u64, "commits continue each other");
                self.tokens.extend(committed.token_ids);
            }
            Some(open_response::Event::Finished(finished)) => {
                let stats = finished.stats.expect("stats come with the end");
                self.end = Some((finished.reason(), stats));
            }
            Some(other) => panic!("unexpected {other:?}"),
            None => return Ok(false),
        }
        Ok(true)
    }

    /// Waits until at least `tokens` tokens are committed.
    pub async fn at_least(&mut self, tokens: usize) -> Result<(), Status> {
        while self.tokens.len() < tokens {
            assert!(
                self.next().await?,
                "the session ended early: {:?}",
                self.end
            );
        }
        Ok(())
    }

    /// Waits for the end; why it came and what the session cost.
    pub async fn finish(&mut self) -> Result<(FinishReason, SessionStats), Status> {
        while self.next().await? {}
        Ok(self.end.expect("a session that ends says how"))
    }
}

/// A draft at work. Dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    events: Streaming<AttachResponse>,
}

impl Attachment {
    /// Waits until the draft detached; why it did.
    pub async fn detached(mut self) -> String {
        match soon("Detached", self.events.message())
            .await
            .unwrap()
            .and_then(|r| r.event)
        {
            Some(attach_response::Event::Detached(detached)) => detached.reason,
            other => panic!("{other:?} in place of Detached"),
        }
    }
}
