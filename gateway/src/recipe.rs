//! [`Recipe`]: what a session is and stays: all that is needed to open it anywhere, at any time.
//!
//! It is kept in the form in which it is logged, so that a session taken from the log and one that a client asks for now
//! are the same thing from here on.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use specattn_proto::v1::{DraftPolicy, LoggedSession, Mode, ModelInfo, OpenRequest, Started};
use specattn_proto::{Fault, SessionId};

/// A session's request, checked and complete, with what its target adds to it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Recipe {
    logged: LoggedSession,
    open: OpenRequest,
    draft: DraftPolicy,
}

impl Recipe {
    /// The recipe of a logged session.
    ///
    /// # Errors
    /// [`Fault::Internal`] when parts are missing: the log is of another version, or damaged.
    pub(crate) fn new(logged: LoggedSession) -> Result<Self, Fault> {
        let missing = || Fault::Internal("the session's record is incomplete".to_owned());
        let open = logged.open.clone().ok_or_else(missing)?;
        let draft = logged.draft.ok_or_else(missing)?;
        if open.token_ids.is_empty() || logged.max_tokens_total == 0 {
            return Err(missing());
        }
        Ok(Self {
            logged,
            open,
            draft,
        })
    }

    /// As it is logged.
    pub(crate) fn logged(&self) -> &LoggedSession {
        &self.logged
    }

    /// The API key that began it, by name; empty where clients have none.
    pub(crate) fn owner(&self) -> &str {
        &self.logged.owner
    }

    pub(crate) fn prompt(&self) -> &[u32] {
        &self.open.token_ids
    }

    pub(crate) fn mode(&self) -> Mode {
        self.open.mode()
    }

    pub(crate) fn stops(&self) -> &[String] {
        &self.logged.stop
    }

    /// Tokens that end the session without showing.
    pub(crate) fn stop_tokens(&self) -> &[u32] {
        &self.logged.stop_token_ids
    }

    /// Most tokens the session may come to hold, prompt included.
    pub(crate) fn max_tokens_total(&self) -> usize {
        usize::try_from(self.logged.max_tokens_total).unwrap_or(usize::MAX)
    }

    /// How drafts work for it; `None` when it uses none.
    pub(crate) fn drafting(&self) -> Option<DraftPolicy> {
        self.draft
            .draft_length
            .is_some_and(|length| length > 0)
            .then_some(self.draft)
    }

    /// What the client is told first.
    pub(crate) fn started(&self, id: SessionId) -> Started {
        Started {
            session_id: id.to_string(),
            prompt_tokens: self.open.prompt_tokens,
            mode: self.open.mode,
            seed: self
                .open
                .sampling
                .as_ref()
                .and_then(|s| s.seed)
                .unwrap_or(0),
        }
    }

    /// Time since the request arrived.
    pub(crate) fn age(&self) -> Duration {
        since(self.logged.arrival_unix_ms)
    }

    /// Time until the session is to end; zero when that has passed.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let deadline = self.logged.deadline_unix_ms?;
        Some(Duration::from_millis(deadline.saturating_sub(unix_ms())))
    }

    /// Whether a target goes on with what another one of this recipe's began: it must be the same checkpoint.
    pub(crate) fn fits(&self, model: &ModelInfo) -> Result<(), Fault> {
        if model.checkpoint_hash == self.logged.checkpoint_hash {
            return Ok(());
        }
        Err(Fault::Unavailable(format!(
            "{} is not the model that began the session",
            model.name
        )))
    }

    /// What to ask of a verify worker, when the session holds `tokens`.
    pub(crate) fn open_request(&self, tokens: Vec<u32>) -> OpenRequest {
        OpenRequest {
            token_ids: tokens,
            ..self.open.clone()
        }
    }
}

/// Milliseconds since the Unix epoch.
pub(crate) fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// Time since a Unix time; zero for the future.
fn since(unix_ms_then: u64) -> Duration {
    Duration::from_millis(unix_ms().saturating_sub(unix_ms_then))
}
