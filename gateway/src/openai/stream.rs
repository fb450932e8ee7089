//! Answers as server-sent events: one JSON chunk an event, `[DONE]` at the end.
//!
//! All choices travel on one stream, each as its own session comes along. A client that leaves drops the stream, and with
//! it every session.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::response::sse;
use futures_util::stream;
use serde_json::Value;
use specattn_proto::Fault;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::{Finished, GenerateResponse, Started};
use tokio_stream::{Stream, StreamExt, StreamMap};
use tonic::Status;

use super::answer::Wording;
use super::error::ApiError;
use super::request::StreamUsage;
use crate::listener::ClientStream;
use crate::tokenizer::Tokenizer;

/// What the client is told when there is no more.
const DONE: &str = "[DONE]";

/// A choice on its way.
#[derive(Default)]
struct Choice {
    echo: String,
    started: Started,
    /// Where its next token's text begins, in characters.
    offset: usize,
    /// Tokens that came, also those whose text is held back.
    tokens: u64,
    finished: Option<Finished>,
}

/// The chunks of an answer.
struct Chunks {
    wording: Wording,
    tokenizer: Arc<Tokenizer>,
    sessions: StreamMap<usize, ClientStream>,
    choices: Vec<Choice>,
    /// Ready to be sent.
    ready: VecDeque<String>,
    done: bool,
}

/// The answer as it comes.
pub(super) fn events(
    wording: Wording,
    streams: Vec<ClientStream>,
    echoes: Vec<String>,
    tokenizer: Arc<Tokenizer>,
) -> sse::Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let choices = echoes.into_iter().map(|echo| Choice {
        offset: echo.chars().count(),
        echo,
        ..Choice::default()
    });
    let chunks = Chunks {
        wording,
        tokenizer,
        choices: choices.collect(),
        sessions: streams.into_iter().enumerate().collect(),
        ready: VecDeque::new(),
        done: false,
    };
    let events = stream::unfold(chunks, |mut chunks| async {
        let data = chunks.next().await?;
        Some((Ok(sse::Event::default().data(data)), chunks))
    });
    sse::Sse::new(events).keep_alive(sse::KeepAlive::default())
}

impl Chunks {
    /// The next event's data; `None` after the last.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.done {
                return None;
            }
            let outcome = match self.sessions.next().await {
                Some((index, message)) => self.take(index, message),
                None => self.end(),
            };
            if let Err(fault) = outcome {
                let body = ApiError::from(fault).body();
                self.ready.extend([body.to_string(), DONE.to_owned()]);
                self.done = true;
            }
        }
    }

    fn take(
        &mut self,
        index: usize,
        message: Result<GenerateResponse, Status>,
    ) -> Result<(), Fault> {
        let message = message.map_err(|status| Fault::from_status(&status))?;
        let choice = &mut self.choices[index];
        let worded = match message.event {
            Some(Event::Started(started)) => {
                choice.started = started;
                self.wording.beginning(index, &choice.echo)
            }
            Some(Event::Delta(delta)) => {
                choice.tokens += delta.token_ids.len() as u64;
                let logprobs =
                    self.wording
                        .logprobs(&delta, &mut choice.offset, &self.tokenizer)?;
                // Tokens whose text is still held back show nothing, unless they are told of themselves.
                let shows = !delta.text.is_empty() || !logprobs.is_null();
                shows.then(|| self.wording.piece(index, &delta.text, logprobs))
            }
            Some(Event::Finished(finished)) => {
                let worded = self.wording.end(index, &finished);
                choice.finished = Some(finished);
                Some(worded)
            }
            Some(Event::Provisional(_) | Event::Withdrawn(_)) | None => None,
        };
        if let Some(worded) = worded {
            self.push(vec![worded]);
        }
        Ok(())
    }

    /// Every session's stream is over.
    fn end(&mut self) -> Result<(), Fault> {
        let ends: Option<Vec<_>> = self
            .choices
            .iter_mut()
            .map(|choice| Some((choice.started.clone(), choice.finished.take()?)))
            .collect();
        let Some(ends) = ends else {
            return Err(Fault::Internal("a session ended without a word".to_owned()));
        };
        if self.wording.stream_usage != StreamUsage::Untold {
            let mut chunk = self.chunk(Vec::new());
            chunk["usage"] = self.wording.usage(&ends);
            self.ready.push_back(chunk.to_string());
        }
        self.ready.push_back(DONE.to_owned());
        self.done = true;
        Ok(())
    }

    fn push(&mut self, choices: Vec<Value>) {
        let mut chunk = self.chunk(choices);
        match self.wording.stream_usage {
            StreamUsage::Untold => {}
            StreamUsage::Last => chunk["usage"] = Value::Null,
            StreamUsage::Every => {
                let choices = self.choices.iter();
                let so_far = choices.map(|choice| (&choice.started, choice.tokens));
                chunk["usage"] = self.wording.usage_so_far(so_far);
            }
        }
        self.ready.push_back(chunk.to_string());
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        self.wording
            .chunk(&self.choices[0].started.session_id, choices)
    }
}
