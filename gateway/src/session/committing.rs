//! What a verify worker says of tokens, and what a session makes of it: first the log, then the transcript.

use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1::{Committed, FinishReason, LoggedTokens, Provisional};

use super::{End, STATS_INTERVAL, Session, Stay, micros};
use crate::transcript::Commit;
use crate::verify_link::VerifyLink;

impl Session {
    /// Takes committed tokens: log, text, client.
    pub(super) async fn commit(
        &mut self,
        verify: &mut VerifyLink,
        committed: Committed,
    ) -> Result<(), Stay> {
        // After a stop string the session is being closed: what was committed meanwhile is nobody's.
        if self.stop.is_some() {
            return Ok(());
        }
        let mut commit = self.check(&committed).map_err(|what| {
            let text = format!("{} {what}", verify.worker.id);
            Stay::Broken(Fault::Internal(text))
        })?;
        if commit.tokens.is_empty() {
            return Ok(());
        }
        let failed = |fault| Stay::Over(End::Failed(fault));
        for index in 0..commit.tokens.len() {
            let scan = self.completion.push(commit.tokens[index]).map_err(failed)?;
            commit.texts.push(scan.text);
            if scan.stop.is_some() {
                commit.tokens.truncate(index + 1);
                commit.logprobs.truncate(index + 1);
                commit.origins.truncate(index + 1);
                self.stop = scan.stop;
                break;
            }
        }
        self.fruitless = 0;
        self.pass.spend(commit.tokens.len());
        if let Some(stats) = committed.stats {
            self.tally.told(stats);
        }
        // As precise as it is logged: a resumed session says the same.
        let elapsed = Duration::from_micros(micros(self.times.arrival.elapsed()));
        self.count(commit.tokens.len(), elapsed);
        self.log_tokens(&commit, elapsed).await.map_err(failed)?;
        self.transcript.commit(commit);
        if self.stop.is_some() {
            verify.close(self.slot.entry.id, FinishReason::Stop);
        }
        Ok(())
    }

    /// Counts tokens committed now, `elapsed` after the request arrived.
    fn count(&mut self, tokens: usize, elapsed: Duration) {
        let now = std::time::Instant::now();
        let before = self.times.committed.replace(now);
        let metrics = &self.gateway.metrics;
        match before {
            Some(before) => metrics.later_tokens(tokens, now - before),
            // A session taken up from the log had its first tokens elsewhere.
            None if self.first_token.is_none() => metrics.first_tokens(tokens, elapsed),
            None => metrics.tokens(tokens),
        }
        self.first_token.get_or_insert(elapsed);
    }

    /// What of the committed tokens is new; or what is wrong with them. A worker may say again what stands already.
    fn check(&self, committed: &Committed) -> Result<Commit, String> {
        let len = self.transcript.len();
        let count = committed.token_ids.len();
        let with_logprobs = committed.logprobs.len() == count;
        let with_origins = [0, count].contains(&committed.origins.len());
        let start = usize::try_from(committed.start).unwrap_or(usize::MAX);
        let known = len.checked_sub(start);
        let fits = count <= self.recipe.max_tokens_total().saturating_sub(start);
        let (Some(known), true, true) = (
            known,
            fits && with_origins,
            with_logprobs || committed.logprobs.is_empty(),
        ) else {
            return Err(format!(
                "committed {count} tokens at {} with {} log-probabilities; the session holds {len} of {}",
                committed.start,
                committed.logprobs.len(),
                self.recipe.max_tokens_total(),
            ));
        };
        let known = known.min(count);
        let stands = committed.token_ids[..known]
            .iter()
            .enumerate()
            .all(|(index, token)| self.transcript.token(start + index) == Some(*token));
        if !stands {
            return Err(format!("changed its mind about tokens from {start} on"));
        }
        Ok(Commit {
            tokens: committed.token_ids[known..].to_vec(),
            texts: Vec::new(),
            origins: committed.origins().skip(known).collect(),
            logprobs: committed
                .logprobs
                .get(known..)
                .map_or_else(Vec::new, <[_]>::to_vec),
        })
    }

    /// Logs tokens before anybody hears of them.
    async fn log_tokens(&mut self, commit: &Commit, elapsed: Duration) -> Result<(), Fault> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        let last = self.times.stats_logged;
        let with_stats = last.is_none_or(|last| last.elapsed() >= STATS_INTERVAL);
        if with_stats {
            self.times.stats_logged = Some(std::time::Instant::now());
        }
        let tokens = LoggedTokens {
            start: self.transcript.committed() as u64,
            token_ids: commit.tokens.clone(),
            logprobs: commit.logprobs.clone(),
            elapsed_us: micros(elapsed),
            stats: with_stats.then(|| self.tally.total()),
        };
        writer.append(tokens).await
    }

    /// Shows the client what is provisional. The verify worker tells only of what the client asked for.
    pub(super) fn look_ahead(&mut self, ahead: Provisional) -> Result<(), Stay> {
        if self.stop.is_some() {
            return Ok(());
        }
        let len = self.transcript.len();
        let count = ahead.token_ids.len();
        let most = self.recipe.max_tokens_total();
        if ahead.start != len as u64 || count > most.saturating_sub(len) {
            return Err(Stay::Broken(Fault::Internal(format!(
                "{count} tokens at {} are provisional; the session holds {len} of {most}",
                ahead.start,
            ))));
        }
        let text = self.completion.preview(&ahead.token_ids);
        let text = text.map_err(|fault| Stay::Over(End::Failed(fault)))?;
        self.transcript.look_ahead(ahead.token_ids, text);
        Ok(())
    }
}
