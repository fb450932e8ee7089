//! [`SessionTrace`]: a session's place in the trace of its request.
//!
//! Three spans however many tokens: the session, its prompt, and what follows. What the rounds came to stands in fields.

use tracing::Span;
use tracing::field::Empty;

use crate::stats::Stats;

/// A session's span and, within it, that of its prompt or of what follows.
#[derive(Debug)]
pub(crate) struct SessionTrace {
    session: Span,
    phase: Span,
    decodes: bool,
}

/// A span for a session, to be made part of its request's trace.
pub(crate) fn session_span() -> Span {
    tracing::info_span!(
        "verify",
        session_id = Empty,
        trace_id = Empty,
        prompt_tokens = Empty,
        completion_tokens = Empty,
        target_forwards = Empty,
        num_proposed = Empty,
        num_accepted = Empty,
        mask_bytes = Empty,
    )
}

impl SessionTrace {
    /// Of a session that waits for its prompt to be processed.
    pub(crate) fn begin(session: Span) -> Self {
        Self {
            phase: tracing::info_span!(parent: &session, "prompt"),
            session,
            decodes: false,
        }
    }

    /// Of a session that nobody traces.
    pub(crate) fn none() -> Self {
        Self {
            session: Span::none(),
            phase: Span::none(),
            decodes: false,
        }
    }

    /// What the session's log lines belong to.
    pub(crate) fn span(&self) -> &Span {
        &self.session
    }

    /// Tokens were committed.
    pub(crate) fn committed(&mut self) {
        if !self.decodes {
            self.decodes = true;
            self.phase = tracing::info_span!(parent: &self.session, "decode");
        }
    }

    /// The session is over, and has cost so much.
    pub(crate) fn end(self, stats: &Stats) {
        let span = &self.session;
        span.record("prompt_tokens", stats.prompt_tokens);
        span.record("completion_tokens", stats.completion_tokens);
        span.record("target_forwards", stats.target_forwards);
        span.record("num_proposed", stats.proposed_tokens);
        span.record("num_accepted", stats.accepted_tokens);
        span.record("mask_bytes", stats.mask_bytes);
    }
}
