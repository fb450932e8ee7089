//! [`Plan`]: a client's request, checked and with every default filled in.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use specattn_proto::v1::{self, generate_request::Prompt};
use specattn_proto::validate::{
    self, CheckedCheckPolicy, CheckedLimits, CheckedMaskPolicy, CheckedSampling, Invalid,
};
use specattn_proto::{Fault, SessionId, limits};

use crate::args::Config;
use crate::recipe::Recipe;

/// Makes tokens of a text.
pub(crate) type Encode<'a> = &'a dyn Fn(&str) -> Result<Vec<u32>, Fault>;

/// What a session is to do.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// Unchecked against any model: that waits for the choice of a verify worker.
    pub(crate) prompt: Vec<u32>,
    /// The seed is present.
    pub(crate) sampling: CheckedSampling,
    pub(crate) limits: CheckedLimits,
    pub(crate) mode: v1::Mode,
    /// How the draft side works; its draft_length is present.
    pub(crate) draft: v1::DraftPolicy,
    /// The client left the draft length open: drafts are used while they pay.
    draft_while_it_pays: bool,
    pub(crate) mask: CheckedMaskPolicy,
    /// The verify worker is to choose the mass of masks itself.
    pub(crate) chooses_mask_p: bool,
    pub(crate) check: CheckedCheckPolicy,
    /// The client wants to see provisional tokens.
    pub(crate) provisional: bool,
    pub(crate) stops: Vec<String>,
    /// From arrival.
    pub(crate) deadline: Option<Duration>,
}

impl Plan {
    /// Checks a request whose text `encode` makes tokens of. Tokenizing takes a while for long prompts: call where blocking is allowed.
    ///
    /// # Errors
    /// [`Fault::InvalidArgument`].
    pub(crate) fn check(
        request: v1::GenerateRequest,
        encode: Encode<'_>,
        vocab_size: usize,
        config: &Config,
    ) -> Result<Self, Fault> {
        let mode = validate::mode(request.mode)?;
        validate::stop_strings(&request.stop)?;
        let mut sampling = validate::sampling(request.sampling.as_ref(), vocab_size)?;
        sampling.seed.get_or_insert_with(rand::random);
        let mut draft = validate::draft_policy(request.draft.as_ref())?;
        let while_it_pays = mode == v1::Mode::Dense && draft.draft_length.is_none();
        draft.draft_length.get_or_insert(config.draft_length);
        Ok(Self {
            sampling,
            limits: validate::session_limits(request.limits.as_ref(), vocab_size)?,
            mode,
            draft,
            draft_while_it_pays: while_it_pays,
            mask: validate::mask_policy(request.mask.as_ref(), config.mask)?,
            chooses_mask_p: mode == v1::Mode::Exact
                && request.mask.is_none_or(|mask| mask.mask_p.is_none()),
            check: validate::check_policy(request.check.as_ref())?,
            provisional: request.provisional,
            stops: request.stop,
            deadline: request
                .deadline_ms
                .map(|ms| Duration::from_millis(ms).min(limits::MAX_DEADLINE)),
            prompt: prompt_tokens(request.prompt, encode)?,
        })
    }

    /// Most draft tokens per round.
    pub(crate) fn draft_length(&self) -> u32 {
        self.draft.draft_length.unwrap_or(0)
    }

    /// Whether a model of this shape can take the session.
    pub(crate) fn fits(&self, model: &v1::ModelInfo) -> Result<(), Invalid> {
        validate::session_tokens(
            &self.prompt,
            model.vocab_size as usize,
            model.max_context as usize,
        )
    }

    /// The session of `owner` that this becomes on a model.
    pub(crate) fn recipe(
        &self,
        id: SessionId,
        owner: &str,
        arrival: SystemTime,
        model: &v1::ModelInfo,
    ) -> Recipe {
        let context = (model.max_context as usize).min(limits::MAX_SESSION_TOKENS);
        let most = match self.limits.max_tokens {
            Some(most) => context.min(self.prompt.len() + most as usize),
            None => context,
        };
        let mut stop_token_ids = self.limits.stop_token_ids.clone();
        if !self.limits.ignore_eos {
            stop_token_ids.extend(&model.eos_token_ids);
        }
        stop_token_ids.sort_unstable();
        let unix_ms = |time: SystemTime| {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        };
        Recipe::new(v1::LoggedSession {
            open: Some(self.open_request(id)),
            draft: Some(self.draft),
            stop: self.stops.clone(),
            stop_token_ids,
            max_tokens_total: most as u64,
            checkpoint_hash: model.checkpoint_hash.clone(),
            arrival_unix_ms: unix_ms(arrival),
            deadline_unix_ms: self.deadline.map(|after| unix_ms(arrival + after)),
            owner: owner.to_owned(),
        })
        .expect("every part is there")
    }

    /// What to ask of a verify worker.
    pub(crate) fn open_request(&self, id: SessionId) -> v1::OpenRequest {
        let mut mask = v1::MaskPolicy::from(self.mask);
        if self.chooses_mask_p {
            mask.mask_p = None;
        }
        v1::OpenRequest {
            session_id: id.to_string(),
            token_ids: self.prompt.clone(),
            // Prompts are bounded far below 2^32 tokens by the message size.
            prompt_tokens: self.prompt.len() as u32,
            sampling: Some((&self.sampling).into()),
            limits: Some((&self.limits).into()),
            mode: self.mode.into(),
            mask: Some(mask),
            draft_length: self.draft_length(),
            check: Some(self.check.into()),
            provisional: self.provisional,
            draft_while_it_pays: self.draft_while_it_pays,
            // What belongs to an opening and not to the session: each fills it in.
            draft_capability: Vec::new(),
            protocol_version: 0,
        }
    }
}

fn prompt_tokens(prompt: Option<Prompt>, encode: Encode<'_>) -> Result<Vec<u32>, Fault> {
    let empty = || Invalid::new("prompt", "is empty");
    match prompt.ok_or_else(empty)? {
        Prompt::Text(text) => {
            if text.is_empty() {
                return Err(empty().into());
            }
            if text.len() > limits::MAX_PROMPT_BYTES {
                let reason = format!("is longer than {} bytes", limits::MAX_PROMPT_BYTES);
                return Err(Invalid::new("prompt", reason).into());
            }
            encode(&text)
        }
        Prompt::TokenIds(tokens) if tokens.ids.is_empty() => Err(empty().into()),
        Prompt::TokenIds(tokens) => Ok(tokens.ids),
    }
}
