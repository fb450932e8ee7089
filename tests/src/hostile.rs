//! [`Hostility`]: draft workers that mean harm, each in its own way and without end.

use std::time::Duration;

use specattn_proto::v1::Propose;
use tonic::Status;
use tonic::transport::Channel;

use crate::stranger::Stranger;

/// The most tokens that sessions of the tests take in a round.
const ROUND: usize = 4;

/// What a hostile draft worker does on its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hostility {
    /// Fitting proposals of random tokens, as fast as they are judged.
    Random,
    /// Proposals of an epoch long gone, as fast as they are answered.
    Stale,
    /// Proposals with megabytes of mask; joins again whenever it is thrown out.
    Oversize,
    /// A round's tokens one by one, just within the time that a draft gets.
    Dripping,
    /// Rounds that never end: their first token again and again.
    NeverEnding,
    /// Joins, then says nothing.
    Silent,
    /// Joins and leaves, as fast as it can.
    Fickle,
}

impl Hostility {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Random,
        Self::Stale,
        Self::Oversize,
        Self::Dripping,
        Self::NeverEnding,
        Self::Silent,
        Self::Fickle,
    ];

    /// Drafts for session `id`, whose first tokens are `known`, until the session is over; how often it joined.
    pub async fn harass(self, channel: Channel, id: &str, known: &[u32]) -> u64 {
        let mut joined = 0;
        let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
        // A session that is over is not found.
        while let Ok(mut stranger) = Stranger::join(channel.clone(), id, known).await {
            joined += 1;
            // Thrown out, or the session is over: the next join tells.
            let _ = self.annoy(&mut stranger, &mut dice).await;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        joined
    }

    /// One link, until it ends.
    async fn annoy(self, stranger: &mut Stranger, dice: &mut u64) -> Result<(), Status> {
        loop {
            let tokens: Vec<u32> = (0..ROUND).map(|_| roll(dice)).collect();
            match self {
                Self::Fickle => return Ok(()),
                Self::Silent => while stranger.verdict().await?.is_some() {},
                Self::Random => {
                    if stranger.insist(&tokens, |propose| propose).await?.is_some() {
                        continue;
                    }
                }
                Self::Stale => {
                    let epoch = stranger.epoch + 1;
                    let propose = stranger.proposal(&tokens);
                    let sent = stranger.send(Propose { epoch, ..propose }).await;
                    if sent && stranger.verdict().await?.is_some() {
                        continue;
                    }
                }
                Self::Oversize => {
                    let propose = stranger.proposal(&tokens);
                    let mask = vec![7; 3 << 20];
                    stranger.send(Propose { mask, ..propose }).await;
                    while stranger.verdict().await?.is_some() {}
                }
                Self::Dripping => {
                    if self.drip(stranger, &tokens).await? {
                        continue;
                    }
                }
                Self::NeverEnding => {
                    let propose = stranger.proposal(&tokens[..1]);
                    let last = false;
                    if stranger.send(Propose { last, ..propose }).await {
                        // Verdicts tell of progress made without it; they are read when they are there.
                        while let Some(verdict) = stranger.verdict_now().await {
                            if verdict?.is_none() {
                                return Ok(());
                            }
                        }
                        continue;
                    }
                }
            }
            return Ok(());
        }
    }

    /// One round, token by token; whether the link goes on.
    async fn drip(self, stranger: &mut Stranger, tokens: &[u32]) -> Result<bool, Status> {
        let whole = stranger.proposal(tokens);
        for (offset, &token) in tokens.iter().enumerate() {
            let part = Propose {
                sequence: whole.sequence * ROUND as u64 + offset as u64,
                offset: offset as u32,
                token_ids: vec![token],
                last: offset + 1 == tokens.len(),
                ..whole.clone()
            };
            if !stranger.send(part).await {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        while let Some(verdict) = stranger.verdict_now().await {
            match verdict? {
                None => return Ok(false),
                Some(verdict) if verdict.judged => stranger.note(tokens, &verdict),
                Some(_) => {}
            }
        }
        Ok(true)
    }
}

/// Some token of the bundled vocabulary.
fn roll(dice: &mut u64) -> u32 {
    // Xorshift: any tokens will do.
    *dice ^= *dice << 13;
    *dice ^= *dice >> 7;
    *dice ^= *dice << 17;
    (*dice % 8_192) as u32
}
