//! Raw messages to checked values, and events to raw messages. Generated types end here.

use specattn_engine::sampling::{SparseDistribution, TokenLogprobs};
use specattn_engine::{KvReads, ModelConfig};
use specattn_mask::Source;
use specattn_proto::v1::{self, open_response, speculate_request, speculate_response};
use specattn_proto::validate::{self, CheckedMaskPolicy, Invalid};
use specattn_proto::{Capability, Fault, SessionId, limits, version};
use specattn_worker::convert;

use crate::draft_link::{LinkEvent, ProposalPart, Verdict, Welcome};
use crate::draft_reads::ClaimBound;
use crate::events::{Ending, Event};
use crate::kept_map::KeptMap;
use crate::oversight::Mode;
use crate::session::SessionSpec;
use crate::stats::Stats;
use crate::waiting::Pacing;

/// Most columns of an inspection.
const MOST_COLUMNS: u32 = 256;

/// Checks an `OpenRequest` against the model.
pub(crate) fn session_spec(
    request: v1::OpenRequest,
    model: &ModelConfig,
) -> Result<SessionSpec, Fault> {
    version::check(request.protocol_version)?;
    let id = request.session_id.parse()?;
    let capability = Capability::from_wire(&request.draft_capability)?;
    let mode = validate::mode(request.mode)?;
    validate::session_tokens(&request.token_ids, model.vocab_size, model.max_context)?;
    let prompt_tokens = request.prompt_tokens as usize;
    if !(1..=request.token_ids.len()).contains(&prompt_tokens) {
        let reason = format!(
            "must be from 1 to the {} tokens given",
            request.token_ids.len()
        );
        return Err(Invalid::new("prompt_tokens", reason).into());
    }
    let sampling = validate::sampling(request.sampling.as_ref(), model.vocab_size)?;
    if sampling.seed.is_none() && !sampling.is_greedy() {
        return Err(Invalid::new("seed", "must be given").into());
    }
    let stops = validate::session_limits(request.limits.as_ref(), model.vocab_size)?;
    let policy = validate::mask_policy(request.mask.as_ref(), CheckedMaskPolicy::default())?;
    let asked_p = request.mask.and_then(|mask| mask.mask_p);
    let check = validate::check_policy(request.check.as_ref())?;
    let draft_length = validate::draft_length(request.draft_length)? as usize;
    let most = model.max_context.min(limits::MAX_SESSION_TOKENS);
    let limit = match stops.max_tokens {
        Some(tokens) => prompt_tokens.saturating_add(tokens as usize).min(most),
        None => most,
    };
    let mut stop_tokens = stops.stop_token_ids;
    if !stops.ignore_eos {
        stop_tokens.extend(&model.eos_token_ids);
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
    }
    Ok(SessionSpec {
        id,
        tokens: request.token_ids,
        prompt_tokens,
        limit,
        sampling: convert::sampling_params(sampling),
        stop_tokens,
        policy: convert::mask_policy(policy),
        mask_p: asked_p,
        mode: match mode {
            v1::Mode::Dense | v1::Mode::Unspecified => Mode::Dense,
            v1::Mode::Sparse => Mode::Sparse,
            v1::Mode::Exact => Mode::Exact,
        },
        check,
        provisional: request.provisional,
        draft_length,
        draft_while_it_pays: request.draft_while_it_pays,
        capability,
    })
}

/// Checks why a session is to be closed.
pub(crate) fn ending(raw: i32) -> Result<Ending, Invalid> {
    match v1::FinishReason::try_from(raw) {
        Ok(v1::FinishReason::Stop) => Ok(Ending::Stop),
        Ok(v1::FinishReason::Length) => Ok(Ending::Length),
        Ok(v1::FinishReason::Cancelled) => Ok(Ending::Cancelled),
        Ok(v1::FinishReason::Deadline) => Ok(Ending::Deadline),
        Ok(v1::FinishReason::Error) => Ok(Ending::Error),
        Ok(v1::FinishReason::Unspecified) | Err(_) => {
            Err(Invalid::new("reason", format!("{raw} is none")))
        }
    }
}

/// Checks which session to inspect, and in how many columns.
pub(crate) fn inspection(request: &v1::InspectRequest) -> Result<(SessionId, usize), Invalid> {
    let columns = request.columns;
    if !(1..=MOST_COLUMNS).contains(&columns) {
        let reason = format!("must be from 1 to {MOST_COLUMNS}");
        return Err(Invalid::new("columns", reason));
    }
    Ok((request.session_id.parse()?, columns as usize))
}

/// What an inspection found.
pub(crate) fn kept_map(map: KeptMap) -> v1::InspectResponse {
    v1::InspectResponse {
        tokens: map.tokens as u64,
        num_layers: map.num_layers as u32,
        columns: map.columns as u32,
        kept: map.kept,
    }
}

/// Takes the first message of a `Speculate` stream.
pub(crate) fn join(message: Option<v1::SpeculateRequest>) -> Result<v1::Join, Fault> {
    match message.and_then(|request| request.message) {
        Some(speculate_request::Message::Join(join)) => {
            version::check(join.protocol_version)?;
            Ok(join)
        }
        Some(speculate_request::Message::Propose(_)) => Err(Fault::FailedPrecondition(
            "the first message must be Join".to_owned(),
        )),
        None => Err(Fault::InvalidArgument(
            "the first message must be Join".to_owned(),
        )),
    }
}

/// Checks that a draft model shares the target's tokens.
pub(crate) fn check_vocabularies(draft: &v1::ModelInfo, target: &ModelConfig) -> Result<(), Fault> {
    let hashes = [&draft.tokenizer_hash, &target.tokenizer_hash];
    let differ = draft.vocab_size as usize != target.vocab_size
        || (hashes[0] != hashes[1] && hashes.iter().all(|hash| !hash.is_empty()));
    if differ {
        return Err(Fault::FailedPrecondition(
            "the draft model's vocabulary is not the target's".to_owned(),
        ));
    }
    Ok(())
}

/// Checks a later message of a `Speculate` stream against the wire's limits; what it claims is cut to `bound`.
pub(crate) fn proposal_part(
    request: v1::SpeculateRequest,
    bound: &ClaimBound,
) -> Result<ProposalPart, Fault> {
    let propose = match request.message {
        Some(speculate_request::Message::Propose(propose)) => propose,
        Some(speculate_request::Message::Join(_)) => {
            return Err(Fault::FailedPrecondition("joined already".to_owned()));
        }
        None => return Err(Fault::InvalidArgument("an empty message".to_owned())),
    };
    let most = limits::MAX_DRAFT_LENGTH as usize;
    let sizes = [
        ("token_ids", propose.token_ids.len(), most),
        ("q", propose.q.len(), most),
        ("mask", propose.mask.len(), limits::MAX_MASK_BYTES),
        (
            "assumed_token_ids",
            propose.assumed_token_ids.len(),
            limits::MAX_ASSUMED_TOKENS,
        ),
    ];
    for (field, size, most) in sizes {
        if size > most {
            return Err(Invalid::new(
                field,
                format!("has {size} entries, at most {most} are taken"),
            )
            .into());
        }
    }
    if let Some(q) = propose
        .q
        .iter()
        .find(|q| q.ids.len() > limits::MAX_Q_ENTRIES)
    {
        return Err(Invalid::new(
            "q",
            format!("has a distribution of {} entries", q.ids.len()),
        )
        .into());
    }
    let pacing = match v1::Pacing::try_from(propose.pacing) {
        Ok(v1::Pacing::Unspecified) => Pacing::InOrder,
        Ok(v1::Pacing::Ahead) => Pacing::Ahead,
        Ok(v1::Pacing::Unawaited) => Pacing::Unawaited,
        Err(_) => {
            let reason = format!("{} is none", propose.pacing);
            return Err(Invalid::new("pacing", reason).into());
        }
    };
    Ok(ProposalPart {
        epoch: propose.epoch,
        base: propose.base,
        sequence: propose.sequence,
        pending_token: propose.pending_token,
        offset: propose.offset as usize,
        tokens: propose.token_ids,
        q: propose
            .q
            .into_iter()
            .map(|q| SparseDistribution {
                ids: q.ids,
                probs: q.probs,
            })
            .collect(),
        mask: propose.mask,
        last: propose.last,
        pacing,
        assumed: propose.assumed_token_ids,
        reads: bound.credit(KvReads {
            read: propose.kv_entries_read,
            dense: propose.kv_entries_dense,
        }),
    })
}

/// An event of the `Open` stream of a target whose KV entries have `kv_entry_bytes` bytes; `progress` is what the session
/// has cost so far, for [`Event::Committed`].
///
/// # Errors
/// The status that ends the stream, for [`Event::Failed`].
pub(crate) fn open_response(
    event: Event,
    progress: Option<Stats>,
    kv_entry_bytes: u32,
) -> Result<v1::OpenResponse, Fault> {
    let event = match event {
        Event::Opened => open_response::Event::Opened(v1::Opened {}),
        Event::Committed {
            start,
            tokens,
            origins,
            logprobs,
        } => open_response::Event::Committed(v1::Committed {
            start: start as u64,
            token_ids: tokens,
            origins: origins
                .into_iter()
                .map(|origin| v1::TokenOrigin::from(origin).into())
                .collect(),
            logprobs: logprobs.into_iter().map(token_logprobs).collect(),
            stats: progress.map(|stats| stats.report(kv_entry_bytes)),
        }),
        Event::Provisional { start, tokens } => {
            open_response::Event::Provisional(v1::Provisional {
                start: start as u64,
                token_ids: tokens,
            })
        }
        Event::RolledBack { to } => {
            open_response::Event::RolledBack(v1::RolledBack { to: to as u64 })
        }
        Event::Finished { ending, stats } => open_response::Event::Finished(v1::SessionFinished {
            reason: v1::FinishReason::from(ending).into(),
            stats: Some(stats.report(kv_entry_bytes)),
        }),
        Event::Failed(fault) => return Err(fault),
    };
    Ok(v1::OpenResponse { event: Some(event) })
}

fn token_logprobs(logprobs: TokenLogprobs) -> v1::TokenLogprobs {
    let (top_ids, top_logprobs) = logprobs.top.into_iter().unzip();
    v1::TokenLogprobs {
        logprob: logprobs.logprob,
        top_ids,
        top_logprobs,
    }
}

/// A message of the `Speculate` stream.
///
/// # Errors
/// The status that ends the stream, for [`LinkEvent::Failed`].
pub(crate) fn speculate_response(event: LinkEvent) -> Result<v1::SpeculateResponse, Fault> {
    let message = match event {
        LinkEvent::Welcome(welcome) => speculate_response::Message::Welcome(raw_welcome(*welcome)),
        LinkEvent::Verdict(verdict) => speculate_response::Message::Verdict(raw_verdict(verdict)),
        LinkEvent::Closed(ending) => speculate_response::Message::Closed(v1::SessionClosed {
            reason: v1::FinishReason::from(ending).into(),
        }),
        LinkEvent::Failed(fault) => return Err(fault),
    };
    Ok(v1::SpeculateResponse {
        message: Some(message),
    })
}

fn raw_welcome(welcome: Welcome) -> v1::Welcome {
    let sampling = convert::checked_sampling(&welcome.sampling, welcome.sampling.seed);
    v1::Welcome {
        epoch: welcome.epoch,
        token_ids: welcome.tokens,
        start: welcome.start as u64,
        sources: welcome.sources.into_iter().map(raw_source).collect(),
        draft_length: welcome.draft_length as u32,
        mask: Some(convert::checked_mask_policy(&welcome.policy).into()),
        sampling: Some((&sampling).into()),
        prompt_tokens: welcome.prompt_tokens as u32,
        may_shorten: welcome.may_shorten,
    }
}

fn raw_source(source: Source) -> v1::Source {
    let terms = source.terms.into_iter();
    v1::Source {
        p_offset: source.p_offset,
        spread: source.spread,
        terms: terms
            .map(|term| v1::SourceTerm {
                layer: term.layer,
                head: term.head,
                weight: term.weight,
            })
            .collect(),
    }
}

fn raw_verdict(verdict: Verdict) -> v1::Verdict {
    v1::Verdict {
        epoch: verdict.epoch,
        base: verdict.base as u64,
        accepted: verdict.accepted as u32,
        next_tokens: verdict.next_tokens,
        judged: verdict.judged,
        need_full_mask: verdict.need_full_mask,
        mask_p: verdict.mask_p,
    }
}
