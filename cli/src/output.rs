//! What a generation came to: the JSON object and the closing line.

use serde::Serialize;
use specattn_proto::v1;

use crate::args::Mode;

/// One finished generation, as `--json` prints it.
#[derive(Debug, Clone, Serialize, PartialEq)]
pub struct Report {
    /// Names the session at its gateway.
    pub session_id: String,
    /// The completion.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// `stop`, `length`, `cancelled`, `deadline` or `error`.
    pub finish_reason: &'static str,
    /// The stop string that ended it, if one did.
    pub stop: Option<String>,
    /// `dense`, `sparse` or `exact`.
    pub mode: &'static str,
    /// The seed in force.
    pub seed: u64,
    /// Tokens in and out.
    pub usage: Usage,
    /// What it cost.
    pub stats: Stats,
}

/// Tokens in and out.
#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, special tokens included.
    pub prompt_tokens: u64,
    /// Those of them that the target's worker had processed for other sessions.
    pub cached_prompt_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
}

/// What a generation cost. Ratios are `null` where nothing was counted.
#[derive(Debug, Clone, Copy, Serialize, PartialEq)]
pub struct Stats {
    /// Target forwards after the prompt.
    pub target_forwards: u64,
    /// Those taken without a draft proposal.
    pub solo_forwards: u64,
    /// Draft tokens verified.
    pub proposed_tokens: u64,
    /// Draft tokens accepted.
    pub accepted_tokens: u64,
    /// Verdicts that rejected a draft token.
    pub rollbacks: u64,
    /// Proposals that came too late.
    pub stale_proposals: u64,
    /// KV entries read by the target.
    pub kv_entries_read: u64,
    /// KV entries that dense attention would have read.
    pub kv_entries_dense: u64,
    /// Their ratio; 1 when no forward was made.
    pub kv_kept_fraction: f64,
    /// KV entries that the draft says it read in its steps.
    pub draft_kv_entries_read: u64,
    /// KV entries that dense draft steps would have read.
    pub draft_kv_entries_dense: u64,
    /// Their ratio.
    pub draft_kv_kept_fraction: Option<f64>,
    /// KV bytes that draft and target read.
    pub system_kv_bytes_read: u64,
    /// KV bytes that dense attention would have read in the same steps and forwards of both.
    pub system_kv_bytes_dense: u64,
    /// Their ratio.
    pub system_kv_kept_fraction: Option<f64>,
    /// Encoded mask bytes received.
    pub mask_bytes: u64,
    /// Rounds that carried a mask.
    pub mask_rounds: u64,
    /// Dense passes that confirmed or refreshed what masked ones did.
    pub check_forwards: u64,
    /// KV entries that those passes read.
    pub kv_entries_checking: u64,
    /// Provisional tokens that confirming passes judged.
    pub provisional_tokens: u64,
    /// Those of them that were committed.
    pub confirmed_tokens: u64,
    /// Mean KL(dense ‖ sparse) in nats per token, where it was measured.
    pub kl_mean: Option<f64>,
    /// Tokens it was measured on.
    pub kl_samples: u64,
    /// Attention mass that masks had to keep at the end; `null` without masks.
    pub mask_p: Option<f32>,
    /// Tokens confirmed at a time at the end; `null` outside exact mode.
    pub confirm_length: Option<u32>,
    /// Seconds from arrival at the gateway to the first token; 0 when there was none.
    pub ttft_seconds: f64,
    /// Seconds from arrival at the gateway to the end.
    pub elapsed_seconds: f64,
    /// Tokens after the first ÷ seconds after the first.
    pub tokens_per_second: Option<f64>,
    /// Tokens generated ÷ target forwards.
    pub tokens_per_forward: Option<f64>,
    /// Draft tokens accepted ÷ verified.
    pub acceptance: Option<f64>,
    /// Encoded mask bytes ÷ rounds that carried a mask.
    pub mask_bytes_per_round: Option<f64>,
}

impl Stats {
    fn new(mode: Mode, finished: &v1::Finished) -> Self {
        let stats = finished.stats.unwrap_or_default();
        let after_first = stats.completion_tokens.saturating_sub(1);
        let seconds = finished.elapsed_seconds - finished.ttft_seconds;
        // The draft's part is a claim of any size.
        let system_read = stats
            .kv_bytes_read
            .saturating_add(stats.draft_kv_bytes_read);
        let system_dense = stats
            .kv_bytes_dense
            .saturating_add(stats.draft_kv_bytes_dense);
        Self {
            target_forwards: stats.target_forwards,
            solo_forwards: stats.solo_forwards,
            proposed_tokens: stats.proposed_tokens,
            accepted_tokens: stats.accepted_tokens,
            rollbacks: stats.rollbacks,
            stale_proposals: stats.stale_proposals,
            kv_entries_read: stats.kv_entries_read,
            kv_entries_dense: stats.kv_entries_dense,
            kv_kept_fraction: ratio(stats.kv_entries_read, stats.kv_entries_dense).unwrap_or(1.0),
            draft_kv_entries_read: stats.draft_kv_entries_read,
            draft_kv_entries_dense: stats.draft_kv_entries_dense,
            draft_kv_kept_fraction: ratio(
                stats.draft_kv_entries_read,
                stats.draft_kv_entries_dense,
            ),
            system_kv_bytes_read: system_read,
            system_kv_bytes_dense: system_dense,
            system_kv_kept_fraction: ratio(system_read, system_dense),
            mask_bytes: stats.mask_bytes,
            mask_rounds: stats.mask_rounds,
            check_forwards: stats.check_forwards,
            kv_entries_checking: stats.kv_entries_checking,
            provisional_tokens: stats.provisional_tokens,
            confirmed_tokens: stats.confirmed_tokens,
            kl_mean: (stats.kl_samples > 0).then_some(stats.kl_mean),
            kl_samples: stats.kl_samples,
            mask_p: (stats.mask_p > 0.0).then_some(stats.mask_p),
            confirm_length: (mode == Mode::Exact).then_some(stats.confirm_length),
            ttft_seconds: finished.ttft_seconds,
            elapsed_seconds: finished.elapsed_seconds,
            tokens_per_second: (after_first > 0 && seconds > 0.0)
                .then(|| after_first as f64 / seconds),
            tokens_per_forward: ratio(stats.completion_tokens, stats.target_forwards),
            acceptance: ratio(stats.accepted_tokens, stats.proposed_tokens),
            mask_bytes_per_round: ratio(stats.mask_bytes, stats.mask_rounds),
        }
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

impl Report {
    /// Puts together what a stream brought.
    pub fn new(
        mode: Mode,
        started: &v1::Started,
        (text, token_ids): (String, Vec<u32>),
        finished: v1::Finished,
    ) -> Self {
        let stats = Stats::new(mode, &finished);
        Self {
            session_id: started.session_id.clone(),
            text,
            usage: Usage {
                prompt_tokens: started.prompt_tokens.into(),
                cached_prompt_tokens: finished.stats.unwrap_or_default().cached_prompt_tokens,
                completion_tokens: token_ids.len() as u64,
            },
            token_ids,
            finish_reason: reason_name(finished.reason()),
            stop: Some(finished.stop).filter(|stop| !stop.is_empty()),
            mode: mode.name(),
            seed: started.seed,
            stats,
        }
    }

    /// Whether the generation was cancelled.
    pub fn was_cancelled(&self) -> bool {
        self.finish_reason == reason_name(v1::FinishReason::Cancelled)
    }

    /// The closing line: speed, tokens per target forward, acceptance, KV kept by the target, by the draft and by both
    /// in bytes, mask bytes per round.
    pub fn summary(&self) -> String {
        let stats = &self.stats;
        let number = |value: Option<f64>, digits: usize| match value {
            Some(value) => format!("{value:.digits$}"),
            None => "-".to_owned(),
        };
        let percent = |value: Option<f64>| match value {
            Some(value) => format!("{:.1} %", 100.0 * value),
            None => "-".to_owned(),
        };
        let mut line = format!(
            "{} tokens ({}): {} tokens/s, {} tokens per target forward, acceptance {}, KV kept {} (draft {}, both {}), \
             mask {} bytes/round",
            self.usage.completion_tokens,
            self.finish_reason,
            number(stats.tokens_per_second, 1),
            number(stats.tokens_per_forward, 2),
            percent(stats.acceptance),
            percent(Some(stats.kv_kept_fraction)),
            percent(stats.draft_kv_kept_fraction),
            percent(stats.system_kv_kept_fraction),
            number(stats.mask_bytes_per_round, 0),
        );
        if let Some(confirmed) = ratio(stats.confirmed_tokens, stats.provisional_tokens) {
            line += &format!(", confirmed {}", percent(Some(confirmed)));
        }
        if let Some(kl) = stats.kl_mean {
            line += &format!(", KL to dense {kl:.4}");
        }
        line
    }
}

fn reason_name(reason: v1::FinishReason) -> &'static str {
    match reason {
        v1::FinishReason::Stop => "stop",
        v1::FinishReason::Length => "length",
        v1::FinishReason::Cancelled => "cancelled",
        v1::FinishReason::Deadline => "deadline",
        v1::FinishReason::Error | v1::FinishReason::Unspecified => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(stats: v1::SessionStats) -> Report {
        let started = v1::Started {
            prompt_tokens: 7,
            seed: 9,
            ..v1::Started::default()
        };
        let finished = v1::Finished {
            reason: v1::FinishReason::Length.into(),
            stats: Some(stats),
            ttft_seconds: 0.5,
            elapsed_seconds: 1.0,
            ..v1::Finished::default()
        };
        Report::new(
            Mode::Sparse,
            &started,
            ("abc".to_owned(), vec![4, 5, 6]),
            finished,
        )
    }

    #[test]
    fn json_has_the_documented_shape() {
        let stats = v1::SessionStats {
            target_forwards: 2,
            proposed_tokens: 8,
            accepted_tokens: 1,
            rollbacks: 2,
            kv_entries_read: 25,
            kv_entries_dense: 100,
            kv_bytes_read: 50,
            kv_bytes_dense: 200,
            draft_kv_entries_read: 30,
            draft_kv_entries_dense: 40,
            draft_kv_bytes_read: 90,
            draft_kv_bytes_dense: 120,
            mask_bytes: 60,
            mask_rounds: 2,
            completion_tokens: 3,
            ..v1::SessionStats::default()
        };
        let report = report(stats);
        let json = serde_json::to_value(&report).unwrap();
        let object = |value: &serde_json::Value, names: &[&str]| {
            for name in names {
                assert!(value.get(name).is_some(), "{name} is missing in {value}");
            }
        };
        object(
            &json,
            &["text", "token_ids", "finish_reason", "usage", "stats"],
        );
        object(&json["usage"], &["prompt_tokens", "completion_tokens"]);
        let names = [
            "target_forwards",
            "proposed_tokens",
            "accepted_tokens",
            "rollbacks",
            "kv_entries_read",
            "kv_entries_dense",
            "kv_kept_fraction",
            "draft_kv_entries_read",
            "draft_kv_entries_dense",
            "draft_kv_kept_fraction",
            "system_kv_bytes_read",
            "system_kv_bytes_dense",
            "mask_bytes",
            "ttft_seconds",
            "elapsed_seconds",
        ];
        object(&json["stats"], &names);
        assert_eq!(json["finish_reason"], "length");
        assert_eq!(json["stats"]["kv_kept_fraction"], 0.25);
        assert_eq!(json["stats"]["system_kv_kept_fraction"], 0.4375);
        assert_eq!(json["stats"]["tokens_per_second"], 4.0);
        assert_eq!(json["stop"], serde_json::Value::Null);
        assert_eq!(
            report.summary(),
            "3 tokens (length): 4.0 tokens/s, 1.50 tokens per target forward, acceptance 12.5 %, KV kept 25.0 % \
             (draft 75.0 %, both 43.8 %), mask 30 bytes/round"
        );
    }

    #[test]
    fn checks_show_in_the_closing_line() {
        let report = report(v1::SessionStats {
            provisional_tokens: 40,
            confirmed_tokens: 38,
            kl_mean: 0.00412,
            kl_samples: 64,
            ..v1::SessionStats::default()
        });
        let line = report.summary();
        assert!(
            line.ends_with(", confirmed 95.0 %, KL to dense 0.0041"),
            "{line}"
        );
    }

    #[test]
    fn nothing_counted_gives_no_ratios() {
        let report = report(v1::SessionStats::default());
        assert_eq!(report.stats.kv_kept_fraction, 1.0);
        assert_eq!(report.stats.acceptance, None);
        assert!(
            report.summary().contains("acceptance -"),
            "{}",
            report.summary()
        );
    }
}
