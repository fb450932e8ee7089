//! A client of the gateway: [`Request`], and the [`Completion`] it comes to.

use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_proto::v1::{
    DraftPolicy, FinishReason, GenerateRequest, GenerateResponse, Limits, MaskPolicy, Mode,
    ResumeRequest, Sampling, SessionStats, Started, TokenIds, generate_request, generate_response,
};
use tonic::{Status, Streaming};

use crate::{Way, soon};

/// A greedy dense request to change to taste.
#[derive(Debug, Clone)]
pub struct Request(pub GenerateRequest);

impl Request {
    /// Continues token ids by `max_tokens` tokens, never stopping at the model's own end.
    pub fn tokens(prompt: &[u32], max_tokens: u32) -> Self {
        Self(GenerateRequest {
            prompt: Some(generate_request::Prompt::TokenIds(TokenIds {
                ids: prompt.to_vec(),
            })),
            limits: Some(Limits {
                max_tokens: Some(max_tokens),
                ignore_eos: true,
                ..Limits::default()
            }),
            sampling: Some(Sampling::default()),
            mode: Mode::Dense.into(),
            ..GenerateRequest::default()
        })
    }

    /// Sets the tokens drafted per round.
    #[must_use]
    pub fn draft_length(mut self, tokens: u32) -> Self {
        self.0.draft = Some(DraftPolicy {
            draft_length: Some(tokens),
            ..DraftPolicy::default()
        });
        self
    }

    /// Asks for masks that keep `mask_p` of a row's mass.
    #[must_use]
    pub fn sparse(mut self, mask_p: f32) -> Self {
        self.0.mode = Mode::Sparse.into();
        self.0.mask = Some(MaskPolicy {
            mask_p: Some(mask_p),
            ..MaskPolicy::default()
        });
        self
    }

    /// Draws tokens at this temperature, by this seed.
    #[must_use]
    pub fn sampled(mut self, temperature: f32, seed: u64) -> Self {
        self.0.sampling = Some(Sampling {
            temperature,
            seed: Some(seed),
            ..Sampling::default()
        });
        self
    }

    /// Asks for confirmed masked attention, with the session's own choice of mass and length.
    #[must_use]
    pub fn exact(mut self) -> Self {
        self.0.mode = Mode::Exact.into();
        self
    }

    /// Sends it.
    pub async fn start(self, channel: impl Way) -> Result<Stream, Status> {
        let mut client = GenerationServiceClient::new(channel);
        let response = soon("an answer", client.generate(self.0)).await?;
        Ok(Stream {
            responses: response.into_inner(),
            completion: Completion::default(),
        })
    }

    /// Takes up the session of a stream that broke, with what came before.
    pub async fn resume(channel: impl Way, completion: Completion) -> Result<Stream, Status> {
        let mut client = GenerationServiceClient::new(channel);
        let started = completion.started.as_ref().expect("the session had begun");
        let request = ResumeRequest {
            session_id: started.session_id.clone(),
            from_index: completion.tokens.len() as u64,
        };
        let response = soon("an answer", client.resume(request)).await?;
        Ok(Stream {
            responses: response.into_inner(),
            completion,
        })
    }

    /// Sends it and waits for the end.
    pub async fn run(self, channel: impl Way) -> Result<Completion, Status> {
        self.start(channel).await?.finish().await
    }
}

/// What came of a request so far.
#[derive(Debug, Clone, Default)]
pub struct Completion {
    /// The first event.
    pub started: Option<Started>,
    /// Committed tokens.
    pub tokens: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Tokens shown beyond them.
    pub provisional: Vec<u32>,
    /// How often such tokens were shown, and withdrawn.
    pub looks_ahead: u64,
    /// See above.
    pub withdrawals: u64,
    /// Why it ended.
    pub reason: Option<FinishReason>,
    /// What it cost.
    pub stats: SessionStats,
}

/// A running request. Dropping it cancels.
#[derive(Debug)]
pub struct Stream {
    responses: Streaming<GenerateResponse>,
    completion: Completion,
}

impl Stream {
    /// Takes the next event; false at the end.
    pub async fn next(&mut self) -> Result<bool, Status> {
        let response = soon("an event", self.responses.message()).await?;
        let Some(event) = response.and_then(|response| response.event) else {
            return Ok(false);
        };
        let completion = &mut self.completion;
        match event {
            generate_response::Event::Started(started) => completion.started = Some(started),
            generate_response::Event::Delta(delta) => {
                assert_eq!(
                    delta.start,
                    completion.tokens.len() as u64,
                    "deltas continue each other"
                );
                // Shown tokens are withdrawn before others take their place.
                let shown = completion.provisional.iter().zip(&delta.token_ids);
                assert!(shown.clone().all(|(shown, committed)| shown == committed));
                let settled = shown.count();
                completion.provisional.drain(..settled);
                completion.tokens.extend(delta.token_ids);
                // Text that was held back at the end may come again to a client that resumes.
                let known = completion.text.get(delta.text_start as usize..);
                let known = known.expect("texts continue each other");
                let new = delta.text.strip_prefix(known);
                completion.text += new.expect("what comes again is the same");
            }
            generate_response::Event::Provisional(ahead) => {
                assert_eq!(
                    ahead.start,
                    completion.tokens.len() as u64,
                    "a look ahead begins where the committed tokens end"
                );
                completion.provisional = ahead.token_ids;
                completion.looks_ahead += 1;
            }
            generate_response::Event::Withdrawn(withdrawn) => {
                let kept = withdrawn.to.checked_sub(completion.tokens.len() as u64);
                let kept = kept.expect("committed tokens are never withdrawn") as usize;
                assert!(kept < completion.provisional.len(), "only what was shown");
                completion.provisional.truncate(kept);
                completion.withdrawals += 1;
            }
            generate_response::Event::Finished(finished) => {
                completion.reason = Some(finished.reason());
                completion.stats = finished.stats.expect("stats come with the end");
            }
        }
        Ok(true)
    }

    /// Waits until at least `tokens` tokens came.
    pub async fn at_least(&mut self, tokens: usize) -> Result<&Completion, Status> {
        while self.completion.tokens.len() < tokens {
            assert!(
                self.next().await?,
                "the stream ended early: {:?}",
                self.completion
            );
        }
        Ok(&self.completion)
    }

    /// What came so far.
    pub fn so_far(&self) -> &Completion {
        &self.completion
    }

    /// Leaves the session; what came so far.
    pub fn leave(self) -> Completion {
        self.completion
    }

    /// Reads on until the stream breaks; what came so far.
    pub async fn broken(mut self) -> Completion {
        loop {
            match self.next().await {
                Ok(true) => {}
                Ok(false) => panic!("the stream ended well: {:?}", self.completion),
                Err(_) => return self.completion,
            }
        }
    }

    /// Waits until at least `tokens` tokens came or the end did; whether it was the end.
    pub async fn until(&mut self, tokens: usize) -> Result<bool, Status> {
        while self.completion.tokens.len() < tokens {
            if !self.next().await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Waits for the end.
    pub async fn finish(mut self) -> Result<Completion, Status> {
        while self.next().await? {}
        Ok(self.completion)
    }
}
