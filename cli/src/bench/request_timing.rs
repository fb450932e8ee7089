//! [`Timed`]: one request as its client saw it.

use std::time::Duration;

use specattn_proto::Fault;
use specattn_proto::v1;
use specattn_proto::v1::generate_response::Event;
use specattn_proto::v1::generation_service_client::GenerationServiceClient;
use specattn_service::channel::Link;
use tokio::time::{Instant, timeout_at};

/// A request that is over. Times count from the start of the load.
#[derive(Debug, Clone)]
pub struct Timed {
    /// When it was to be sent.
    pub due: Duration,
    /// When the end came.
    pub end: Duration,
    /// When tokens came, and how many.
    pub tokens: Vec<(Duration, u32)>,
    /// What the session cost, or why there was none: the label of a fault, or the name of an ending before its time.
    pub outcome: Result<v1::SessionStats, &'static str>,
}

impl Timed {
    /// A request that was given up without an answer.
    pub fn failed(due: Duration, end: Duration, why: &'static str) -> Self {
        Self {
            due,
            end,
            tokens: Vec::new(),
            outcome: Err(why),
        }
    }

    /// Time to the first token.
    pub fn ttft(&self) -> Option<Duration> {
        let (first, _) = self.tokens.first()?;
        Some(first.saturating_sub(self.due))
    }

    /// Time to the end.
    pub fn e2e(&self) -> Duration {
        self.end.saturating_sub(self.due)
    }

    /// Time per token after the first message: how long each later message took and how many tokens it brought.
    pub fn gaps(&self) -> impl Iterator<Item = (Duration, u32)> {
        self.tokens.windows(2).map(|pair| {
            let [(before, _), (at, count)] = pair else {
                unreachable!("windows of two")
            };
            (at.saturating_sub(*before), *count)
        })
    }

    /// Mean time per token after the first message.
    pub fn mean_gap(&self) -> Option<Duration> {
        let after_first: u32 = self.tokens.iter().skip(1).map(|(_, count)| count).sum();
        let (first, last) = (self.tokens.first()?.0, self.tokens.last()?.0);
        (after_first > 0).then(|| last.saturating_sub(first) / after_first)
    }
}

/// The times that bound a request.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// When the load began.
    pub start: Instant,
    /// When the request is due, after that.
    pub due: Duration,
    /// When to wait no longer.
    pub give_up: Instant,
}

/// Sends `request` and follows it to its end; `tell` hears of tokens as they come.
pub async fn time(
    channel: Link,
    request: v1::GenerateRequest,
    clock: Clock,
    tell: impl Fn(u32),
) -> Timed {
    let mut tokens = Vec::new();
    let following = follow(channel, request, |count| {
        tokens.push((clock.start.elapsed(), count));
        tell(count);
    });
    let outcome = timeout_at(clock.give_up, following).await;
    Timed {
        due: clock.due,
        end: clock.start.elapsed(),
        tokens,
        outcome: outcome.unwrap_or(Err("unfinished")),
    }
}

async fn follow(
    channel: Link,
    request: v1::GenerateRequest,
    mut took: impl FnMut(u32),
) -> Result<v1::SessionStats, &'static str> {
    let label = |status| Fault::from_status(&status).label();
    let mut client = GenerationServiceClient::new(channel);
    let mut stream = client.generate(request).await.map_err(label)?.into_inner();
    loop {
        let response = stream.message().await.map_err(label)?;
        match response.and_then(|response| response.event) {
            Some(Event::Delta(delta)) if !delta.token_ids.is_empty() => {
                took(delta.token_ids.len() as u32);
            }
            Some(Event::Finished(finished)) => {
                return match finished.reason() {
                    v1::FinishReason::Stop | v1::FinishReason::Length => {
                        Ok(finished.stats.unwrap_or_default())
                    }
                    v1::FinishReason::Cancelled => Err("cancelled"),
                    v1::FinishReason::Deadline => Err("deadline"),
                    v1::FinishReason::Error | v1::FinishReason::Unspecified => Err("error"),
                };
            }
            Some(_) => {}
            None => return Err("protocol"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn times_count_from_when_the_request_was_due() {
        let timed = Timed {
            due: ms(100),
            end: ms(190),
            tokens: vec![(ms(130), 1), (ms(150), 4), (ms(180), 2)],
            outcome: Ok(v1::SessionStats::default()),
        };
        assert_eq!(timed.ttft(), Some(ms(30)));
        assert_eq!(timed.e2e(), ms(90));
        assert_eq!(timed.gaps().collect::<Vec<_>>(), [(ms(20), 4), (ms(30), 2)]);
        assert_eq!(timed.mean_gap(), Some(ms(50) / 6));
    }

    #[test]
    fn a_request_without_tokens_has_no_latencies_but_its_end() {
        let timed = Timed::failed(ms(5), ms(9), "unavailable");
        assert_eq!(
            (timed.ttft(), timed.mean_gap(), timed.e2e()),
            (None, None, ms(4))
        );
    }
}
