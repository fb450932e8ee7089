//! Raw messages to checked values, and proposals to raw messages. Generated types end here.

use std::time::Duration;

use specattn_engine::ModelConfig;
use specattn_engine::sampling::DraftToken;
use specattn_mask::{Source, Term};
use specattn_proto::v1::{self, ModelInfo, speculate_request, speculate_response};
use specattn_proto::validate::{self, CheckedMaskPolicy, Invalid};
use specattn_proto::version::{self, PROTOCOL_VERSION};
use specattn_proto::{Capability, Fault, SessionId, limits};
use specattn_worker::convert;

use crate::args::Drafting;
use crate::session::{Proposal, SessionSpec, Verdict, Welcome};

/// Which session to join, and by what right.
#[derive(Debug)]
pub(crate) struct Joining {
    pub(crate) session: SessionId,
    pub(crate) capability: Option<Capability>,
    /// Tokens of the session that the draft knows.
    pub(crate) known: usize,
}

/// A checked `AttachRequest`.
#[derive(Debug)]
pub(crate) struct Attach {
    pub(crate) joining: Joining,
    /// URI of the verify worker.
    pub(crate) endpoint: String,
    pub(crate) spec: SessionSpec,
}

/// Checks an `AttachRequest` against the model.
pub(crate) fn attach(
    request: v1::AttachRequest,
    model: &ModelConfig,
    drafting: Drafting,
) -> Result<Attach, Fault> {
    version::check(request.protocol_version)?;
    let joining = Joining {
        session: request.session_id.parse()?,
        capability: Capability::from_wire(&request.capability)?,
        known: request.token_ids.len(),
    };
    validate::endpoint("verify_endpoint", &request.verify_endpoint)?;
    validate::session_tokens(&request.token_ids, model.vocab_size, model.max_context)?;
    let policy = validate::draft_policy(request.policy.as_ref())?;
    let draft_length = policy.draft_length.unwrap_or(0) as usize;
    if draft_length == 0 {
        return Err(Invalid::new("draft_length", "must be at least 1").into());
    }
    let limit = usize::try_from(request.max_tokens_total).unwrap_or(usize::MAX);
    let limit = limit.min(limits::MAX_SESSION_TOKENS);
    if limit < request.token_ids.len() {
        let reason = "is less than the tokens so far";
        return Err(Invalid::new("max_tokens_total", reason).into());
    }
    let mut drafting = drafting;
    if let Some(steps) = policy.capture_every {
        drafting.own.capture_every = steps as usize;
    }
    if let Some(p) = policy.own_p {
        drafting.own.p = p;
    }
    Ok(Attach {
        joining,
        endpoint: request.verify_endpoint,
        spec: SessionSpec {
            capacity: (limit + draft_length).min(model.max_context),
            tokens: request.token_ids,
            limit,
            draft_length,
            drafting,
        },
    })
}

/// The first message of a `Speculate` stream.
pub(crate) fn join(joining: &Joining, model: ModelInfo) -> v1::SpeculateRequest {
    let capability = joining.capability.as_ref();
    request(speculate_request::Message::Join(v1::Join {
        session_id: joining.session.to_string(),
        draft_model: Some(model),
        known_tokens: joining.known as u64,
        capability: capability.map(Capability::to_wire).unwrap_or_default(),
        protocol_version: PROTOCOL_VERSION,
    }))
}

/// A later one, with its mask in bytes.
pub(crate) fn propose(proposal: Proposal, mask: Vec<u8>) -> v1::SpeculateRequest {
    let (pacing, assumed) = match proposal.ahead {
        None => (v1::Pacing::Unspecified, Vec::new()),
        Some(ahead) if ahead.unawaited => (v1::Pacing::Unawaited, ahead.assumed),
        Some(ahead) => (v1::Pacing::Ahead, ahead.assumed),
    };
    let mut raw = v1::Propose {
        epoch: proposal.epoch,
        base: proposal.base as u64,
        sequence: proposal.sequence,
        offset: proposal.offset as u32,
        token_ids: Vec::with_capacity(proposal.draft.len()),
        q: Vec::new(),
        mask,
        last: proposal.last,
        pending_token: proposal.pending_token,
        kv_entries_read: proposal.kv.read,
        kv_entries_dense: proposal.kv.dense,
        pacing: pacing.into(),
        assumed_token_ids: assumed,
    };
    for DraftToken { token, q } in proposal.draft {
        raw.token_ids.push(token);
        raw.q.extend(q.map(|q| v1::DraftDistribution {
            ids: q.ids,
            probs: q.probs,
        }));
    }
    request(speculate_request::Message::Propose(raw))
}

fn request(message: speculate_request::Message) -> v1::SpeculateRequest {
    v1::SpeculateRequest {
        message: Some(message),
    }
}

/// What a verify worker says after its welcome.
#[derive(Debug)]
pub(crate) enum Answer {
    Verdict(Verdict),
    /// The session is over, for this reason.
    Closed(v1::FinishReason),
}

/// Checks the first answer of a `Speculate` stream, for a draft that knows `known` tokens.
pub(crate) fn welcome(
    response: Option<v1::SpeculateResponse>,
    model: &ModelConfig,
    known: usize,
) -> Result<Welcome, Fault> {
    let Some(speculate_response::Message::Welcome(raw)) = response.and_then(|r| r.message) else {
        return Err(Fault::Unavailable(
            "the verify worker sent no welcome".to_owned(),
        ));
    };
    if raw.start != known as u64 {
        return Err(Invalid::new("start", format!("is {}, not {known}", raw.start)).into());
    }
    let sampling = validate::sampling(raw.sampling.as_ref(), model.vocab_size)?;
    let policy = validate::mask_policy(raw.mask.as_ref(), CheckedMaskPolicy::default())?;
    let draft_length = validate::draft_length(raw.draft_length)? as usize;
    if draft_length == 0 {
        return Err(Invalid::new("draft_length", "must be at least 1").into());
    }
    Ok(Welcome {
        epoch: raw.epoch,
        tokens: raw.token_ids,
        prompt_tokens: raw.prompt_tokens as usize,
        draft_length,
        may_shorten: raw.may_shorten,
        sampling: convert::sampling_params(sampling),
        policy: convert::mask_policy(policy),
        sources: sources(raw.sources, model)?,
    })
}

fn sources(raw: Vec<v1::Source>, model: &ModelConfig) -> Result<Vec<Source>, Fault> {
    if raw.len() > limits::MAX_SOURCES {
        return Err(Invalid::new("sources", "are too many").into());
    }
    let (layers, heads) = (model.num_layers as u32, model.num_heads as u32);
    raw.into_iter()
        .map(|source| {
            let terms = source.terms.into_iter();
            let source = Source {
                p_offset: source.p_offset,
                spread: source.spread,
                terms: terms
                    .map(|term| Term {
                        layer: term.layer,
                        head: term.head,
                        weight: term.weight,
                    })
                    .collect(),
            };
            source
                .validate(layers, heads)
                .map_err(|error| Fault::InvalidArgument(error.to_string()))?;
            Ok(source)
        })
        .collect()
}

/// Checks a later answer.
pub(crate) fn answer(response: v1::SpeculateResponse) -> Result<Answer, Fault> {
    match response.message {
        Some(speculate_response::Message::Verdict(verdict)) => Ok(Answer::Verdict(Verdict {
            epoch: verdict.epoch,
            base: verdict.base,
            accepted: verdict.accepted as usize,
            next_tokens: verdict.next_tokens,
            judged: verdict.judged,
            need_full_mask: verdict.need_full_mask,
            mask_p: verdict.mask_p.map(validate::mask_p).transpose()?,
        })),
        Some(speculate_response::Message::Closed(closed)) => Ok(Answer::Closed(closed.reason())),
        Some(speculate_response::Message::Welcome(_)) => {
            Err(Fault::FailedPrecondition("welcomed twice".to_owned()))
        }
        None => Err(Fault::InvalidArgument("an empty message".to_owned())),
    }
}

/// An event of the `Attach` stream: the verify worker, which is so far, has welcomed the draft.
pub(crate) fn attached(round_trip: Option<Duration>) -> v1::AttachResponse {
    let measured = round_trip.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    let attached = v1::Attached {
        round_trip_us: measured.unwrap_or(0),
    };
    v1::AttachResponse {
        event: Some(v1::attach_response::Event::Attached(attached)),
    }
}

/// Its last event.
pub(crate) fn detached(reason: String) -> v1::AttachResponse {
    v1::AttachResponse {
        event: Some(v1::attach_response::Event::Detached(v1::Detached {
            reason,
        })),
    }
}
