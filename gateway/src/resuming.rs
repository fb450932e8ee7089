//! Sessions taken up from the log: those that ended, and those that a dead gateway or a vanished client left.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::{FinishReason, LoggedEnd};
use specattn_proto::{Fault, SessionId};
use tracing::Instrument;

use crate::Gateway;
use crate::completion::Completion;
use crate::generation_service::{Caller, unknown};
use crate::listener::{ClientStream, Listener};
use crate::log::Stored;
use crate::opening::Opening;
use crate::recipe::{Recipe, unix_ms};
use crate::registry::Prefix;
use crate::session::{Session, Times, conclude, finished, micros};
use crate::tally::Tally;
use crate::tokenizer::Tokenizer;
use crate::transcript::{Commit, Reader, Transcript};

/// A stored session, as far as it has come.
struct Replayed {
    recipe: Recipe,
    transcript: Arc<Transcript>,
    completion: Completion,
    /// The stop string that completed.
    stop: Option<String>,
    /// How it ended, by its tokens alone.
    ending: Option<FinishReason>,
}

impl Gateway {
    /// A client's stream of a session that does not run.
    pub(crate) async fn resume_logged(
        self: &Arc<Self>,
        id: SessionId,
        from: u64,
        caller: Caller,
    ) -> Result<ClientStream, Fault> {
        let log = self.log.as_ref().ok_or_else(|| unknown(id))?;
        // Whoever has the place is the only one to continue it.
        let slot = self
            .sessions
            .claim(id, caller.linger)
            .ok_or_else(|| Fault::Unavailable("the session is being opened".to_owned()))?;
        let (stored, writer) = log.load(id).await?.ok_or_else(|| unknown(id))?;
        if !caller.client.may_reach(&stored.session.owner) {
            return Err(unknown(id));
        }
        let first_token = stored.first_token_us.map(Duration::from_micros);
        let tally = Tally::resumed(stored.stats);
        let logged_end = stored.end.clone();
        let tokenizer = Arc::clone(&self.tokenizer);
        // The text of a long completion takes a while.
        let replaying = tokio::task::spawn_blocking(move || replay(stored, tokenizer));
        let mut replayed = replaying
            .await
            .map_err(|error| Fault::Internal(format!("reading the session failed: {error}")))??;
        let reader = Reader::new(Arc::clone(&replayed.transcript), from)?;

        let overdue = replayed
            .recipe
            .deadline()
            .is_some_and(|left| left.is_zero());
        let ending = replayed
            .ending
            .or(overdue.then_some(FinishReason::Deadline));
        let end = match (logged_end, ending) {
            (Some(end), _) => Some(end),
            (None, Some(reason)) => {
                let mut stats = tally.total();
                stats.completion_tokens = replayed.transcript.committed() as u64;
                stats.prompt_tokens = replayed.recipe.prompt().len() as u64;
                Some(LoggedEnd {
                    reason: reason.into(),
                    stats: Some(stats),
                    stop: replayed.stop.clone().unwrap_or_default(),
                    elapsed_us: micros(replayed.recipe.age()),
                    ended_unix_ms: unix_ms(),
                })
            }
            (None, None) => None,
        };
        if let Some(end) = end {
            let tail = conclude(&mut replayed.completion, &mut replayed.stop)?;
            replayed
                .transcript
                .end(&tail, Ok(finished(&end, first_token)));
            if ending.is_some() {
                writer.end(end).await?;
            }
            tracing::info!(from, "an ended session is delivered from the log");
            let started = replayed.recipe.started(id);
            let (listener, stream) =
                Listener::new(reader, started, self.config.client_stall_timeout);
            self.tasks.spawn(listener.run(None).in_current_span());
            return Ok(stream);
        }

        let pass = self.admit(&caller).await?;
        let tokens = replayed.transcript.tokens();
        pass.spend(tokens.len());
        let barred = BTreeSet::new();
        let recipe = &replayed.recipe;
        let opening = Opening {
            registry: &self.registry,
            request: &|model| {
                recipe.fits(model)?;
                Ok(recipe.open_request(tokens.clone()))
            },
            prefix: Prefix::of(&tokens),
            barred: &barred,
            patience: self.admission.patience(),
            waits_for_workers: true,
        };
        let open = opening.open().await?;
        tracing::info!(from, tokens = tokens.len(), verify_worker = %open.worker.id, "session taken up");
        self.metrics.resumed();
        let session = Session {
            gateway: Arc::clone(self),
            slot,
            pass,
            transcript: replayed.transcript,
            completion: replayed.completion,
            writer: Some(writer),
            tally,
            first_token,
            stop: None,
            times: Times::of(&replayed.recipe),
            barred: BTreeSet::new(),
            fruitless: 0,
            recipe: replayed.recipe,
        };
        self.carry(session, open, from)
    }
}

/// Brings a stored session to where it was.
fn replay(stored: Stored, tokenizer: Arc<Tokenizer>) -> Result<Replayed, Fault> {
    let recipe = Recipe::new(stored.session)?;
    let mut completion = Completion::new(
        tokenizer,
        recipe.prompt(),
        recipe.stops().to_vec(),
        recipe.stop_tokens().to_vec(),
    )?;
    let mut commit = Commit {
        tokens: stored.tokens,
        texts: Vec::new(),
        // Not logged: they are for those who watch.
        origins: Vec::new(),
        logprobs: stored.logprobs,
    };
    let mut stop = None;
    for token in &commit.tokens {
        let scan = completion.push(*token)?;
        commit.texts.push(scan.text);
        stop = scan.stop;
    }
    let last = commit.tokens.last();
    let by_token = last.is_some_and(|token| completion.is_stop_token(*token));
    let total = recipe.prompt().len() + commit.tokens.len();
    let ending = if stop.is_some() || by_token {
        Some(FinishReason::Stop)
    } else {
        (total >= recipe.max_tokens_total()).then_some(FinishReason::Length)
    };
    let transcript = Arc::new(Transcript::new(recipe.prompt().to_vec()));
    transcript.commit(commit);
    Ok(Replayed {
        recipe,
        transcript,
        completion,
        stop,
        ending,
    })
}
