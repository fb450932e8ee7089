//! [`Prospects`]: what a session may come to while its target is at work, and the rounds drafted for it.
//!
//! A verdict says how many draft tokens were accepted and which token follows them. Before it comes the draft can tell what
//! it may say: any number accepted, then one of the tokens that it guesses there ([`Guess`]). Each such outcome is a
//! *prospect*: a text, with a round of its own. What may come after that round are prospects again, so they are a tree. Its
//! root is the session as told. The target is judging the root's round; where none was there in time, and it does not wait
//! for drafts, it is taking a step alone, whose token is guessed likewise.
//!
//! The most probable prospect without a round is drafted next. Once it is told what happened, that prospect is the root and
//! what did not happen is forgotten. A chain of guesses that all is accepted is the special case of a draft that is always
//! right. Trees of guesses are common where they are verified in one forward (Miao et al., "SpecInfer", ASPLOS 2024); these
//! are not verified, they have the round of whichever comes true ready at the target.

use specattn_engine::sampling::DraftToken;

use crate::acceptance::Acceptance;
use crate::guesses::{GUESSES, Guess};

/// Forwards of the target whose outcomes are guessed, one behind the other. While it is at one the next round must be
/// there, and the verdict that lets the draft begin the one after is on its way.
pub(crate) const MOST_DEPTH: usize = 2;

/// Most prospects held, the root among them.
const MOST: usize = 60;

/// Draft tokens for a prospect that is less likely to come true have a quarter of the entries in their distributions: most of
/// such rounds are sent for nothing.
const LIKELY: f64 = 0.1;

/// A round whose first token is less likely to be used is not begun: for each session of the worker that looks ahead, since their
/// steps are batched and each makes those of all others longer; and the most that it comes to.
const LEAST_CHANCE: f64 = 0.001;
const LEAST_CHANCE_MOST: f64 = 0.2;

/// How much likelier a token must be that makes a round longer: a round that is there saves the target a wait, one that is longer a
/// share of the next verdict.
const WORTH_OF_A_ROUND: f64 = 3.0;

/// What guesses are judged by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Odds {
    /// How often draft tokens are accepted.
    pub(crate) acceptance: Acceptance,
    /// Sessions that look ahead, this one among them.
    pub(crate) explorers: usize,
    /// Draft tokens that rounds may have together: what the target holds of them.
    pub(crate) most_tokens: usize,
}

impl Odds {
    /// The least probability of being used for which a token is drafted.
    fn least(self) -> f64 {
        (LEAST_CHANCE * self.explorers as f64).min(LEAST_CHANCE_MOST)
    }

    /// Draft tokens, `room` at most, that are likely enough to be used in a round for a text of this chance.
    ///
    /// Known before any of them is drawn: were a round to end at a token that the draft doubts, it would be there earlier than
    /// others, and be judged more often. Tokens drawn from q keep the target's distribution only if what they are has no
    /// part in whether they are judged.
    fn length(self, chance: f64, room: usize) -> usize {
        let usual = self.acceptance.probability();
        let mut used = chance * usual;
        let mut length = room.min(1);
        while length < room && used * usual >= WORTH_OF_A_ROUND * self.least() {
            used *= usual;
            length += 1;
        }
        length
    }
}

/// What the best guess of a token is taken to be worth before the draft has looked.
const UNSEEN: f64 = 0.5;

/// What may follow a text.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    guess: Guess,
    /// There is a prospect of it, or it was drawn and can only be accepted.
    taken: bool,
}

/// How far a prospect is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its round is being drafted.
    Drafting,
    /// Its round is at the target, or on the way.
    Sent,
    /// The target takes a step alone from here.
    Alone,
}

/// A text that the session may come to.
#[derive(Debug)]
struct Prospect {
    /// Of the prospect that it follows from; of the root, itself.
    parent: usize,
    depth: usize,
    /// Tokens after the text as told.
    tail: Vec<u32>,
    /// The session's epoch then.
    epoch: u64,
    chance: f64,
    stage: Stage,
    round: Vec<DraftToken>,
    /// The draft's doubt in each, as far as known.
    doubts: Vec<Option<f64>>,
    /// Draft tokens that the round is to have.
    length: usize,
    /// What may follow after each number of the round's tokens, as far as the draft has looked; most probable first.
    outlooks: Vec<Vec<Candidate>>,
}

impl Prospect {
    /// Its tokens after the text as told, the round's among them.
    fn text(&self) -> impl Iterator<Item = u32> {
        let round = self.round.iter().map(|d| d.token);
        self.tail.iter().copied().chain(round)
    }

    /// Tokens of the round that the target judges.
    fn judged(&self) -> &[DraftToken] {
        match self.stage {
            Stage::Alone => &[],
            Stage::Drafting | Stage::Sent => &self.round,
        }
    }

    /// The probability that `guess` follows `accepted` of the round's tokens, which are accepted with probability `reached`.
    fn outcome(&self, accepted: usize, reached: f64, guess: &Guess, acceptance: Acceptance) -> f64 {
        match self.judged().get(accepted) {
            Some(DraftToken { q: Some(_), .. }) => {
                let doubt = self.doubts.get(accepted).copied().flatten();
                reached * (1.0 - acceptance.of(doubt)) * guess.recovered
            }
            // What a greedy target may find most probable instead is that already.
            Some(DraftToken { q: None, .. }) | None => reached * guess.added,
        }
    }
}

/// What is worth doing next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Next {
    /// Draft on this prospect's round.
    Draft(usize),
    /// See what may follow all of this prospect's round.
    Look(usize),
    /// Begin the prospect in which so many tokens are accepted, and this guess follows.
    Begin {
        of: usize,
        accepted: usize,
        guess: usize,
        chance: f64,
    },
}

/// What is left once it is told what happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advanced {
    /// Nothing: it was not foreseen.
    Lost,
    /// It was foreseen, but not what forwards are for.
    Moved,
    /// What forwards are for is part of it.
    Kept,
}

/// The tree of one session.
#[derive(Debug)]
pub(crate) struct Prospects {
    /// The root, then others, each behind the one that it follows from.
    all: Vec<Prospect>,
    /// The one that forwards are for.
    current: usize,
}

impl Prospects {
    /// Of a session at `epoch` whose target has no round: it waits for one of `length` tokens or, `unawaited`, goes on alone.
    pub(crate) fn new(epoch: u64, length: usize, unawaited: bool) -> Self {
        let root = Prospect {
            parent: 0,
            depth: 0,
            tail: Vec::new(),
            epoch,
            chance: 1.0,
            stage: if unawaited {
                Stage::Alone
            } else {
                Stage::Drafting
            },
            round: Vec::new(),
            doubts: Vec::new(),
            length: if unawaited { 0 } else { length },
            outlooks: Vec::new(),
        };
        Self {
            all: vec![root],
            current: 0,
        }
    }

    /// Whether the round under way is the one that the target waits for.
    pub(crate) fn is_awaited(&self) -> bool {
        self.current == 0 && self.all[0].stage == Stage::Drafting
    }

    /// The round that the target judges, if it judges any.
    pub(crate) fn judged(&self) -> &[DraftToken] {
        match self.all[0].stage {
            Stage::Sent => &self.all[0].round,
            Stage::Drafting | Stage::Alone => &[],
        }
    }

    /// The draft's doubt in each of its tokens.
    pub(crate) fn judged_doubts(&self) -> &[Option<f64>] {
        &self.all[0].doubts[..self.judged().len()]
    }

    /// That round, when there is nothing to look ahead to any more.
    pub(crate) fn into_judged(mut self) -> Vec<DraftToken> {
        match self.all[0].stage {
            Stage::Sent => self.all.swap_remove(0).round,
            Stage::Drafting | Stage::Alone => Vec::new(),
        }
    }

    /// The tokens after those told that forwards are for: a prospect's, and its round's.
    pub(crate) fn text(&self) -> impl Iterator<Item = u32> {
        self.all[self.current].text()
    }

    /// What is worth most. `room` says how many draft tokens a round after so many tokens beyond those told may have.
    fn next(&self, odds: Odds, room: &impl Fn(usize) -> usize) -> Option<Next> {
        if self.all[self.current].stage == Stage::Drafting {
            return (self.all[self.current].length > 0).then_some(Next::Draft(self.current));
        }
        let acceptance = odds.acceptance;
        let usual = acceptance.probability();
        // A target that steps alone is to get some round, or nobody would ever learn what they come to.
        let has_none = self.all.len() == 1 && self.all[0].stage == Stage::Alone;
        let mut best = (if has_none { 0.0 } else { odds.least() }, None);
        let mut consider = |chance: f64, next: Next| {
            if chance * usual > best.0 {
                best = (chance * usual, Some(next));
            }
        };
        let tokens: usize = self.all.iter().map(|prospect| prospect.length).sum();
        if self.all.len() >= MOST || tokens >= odds.most_tokens {
            return None;
        }
        for (of, prospect) in self.all.iter().enumerate() {
            if prospect.depth == MOST_DEPTH {
                continue;
            }
            let judged = prospect.judged().len();
            let mut reached = prospect.chance;
            for accepted in 0..=judged {
                if room(prospect.tail.len() + accepted + 1) == 0 {
                    break;
                }
                if let Some(outlook) = prospect.outlooks.get(accepted) {
                    // The most probable comes first.
                    let mut left = outlook.iter().enumerate();
                    if let Some((guess, candidate)) = left.find(|(_, g)| !g.taken) {
                        let chance =
                            prospect.outcome(accepted, reached, &candidate.guess, acceptance);
                        let begin = Next::Begin {
                            of,
                            accepted,
                            guess,
                            chance,
                        };
                        consider(chance, begin);
                    }
                } else if accepted == judged {
                    consider(reached * UNSEEN, Next::Look(of));
                }
                reached *= prospect
                    .doubts
                    .get(accepted)
                    .map_or(1.0, |&doubt| acceptance.of(doubt));
            }
        }
        best.1
    }

    /// Whether a forward is worth running.
    pub(crate) fn has_work(&self, odds: Odds, room: &impl Fn(usize) -> usize) -> bool {
        self.next(odds, room).is_some()
    }

    /// Turns to what is worth most; whether there is anything. The next forward is to show what follows
    /// [`text`](Prospects::text).
    pub(crate) fn choose(&mut self, odds: Odds, room: &impl Fn(usize) -> usize) -> bool {
        match self.next(odds, room) {
            None => false,
            Some(Next::Draft(at) | Next::Look(at)) => {
                self.current = at;
                true
            }
            Some(Next::Begin {
                of,
                accepted,
                guess,
                chance,
            }) => {
                let candidate = &mut self.all[of].outlooks[accepted][guess];
                candidate.taken = true;
                let token = candidate.guess.token;
                self.begin(of, accepted, token, chance);
                let begun = &mut self.all[self.current];
                begun.length = odds.length(chance, room(begun.tail.len()));
                true
            }
        }
    }

    /// Begins the prospect in which so many tokens are accepted and `token` follows.
    fn begin(&mut self, of: usize, accepted: usize, token: u32, chance: f64) {
        let parent = &self.all[of];
        let judged = parent.judged();
        // All accepted, and the epoch stays; a rejection or a step alone raises it.
        let raised = judged.is_empty() || accepted < judged.len();
        let tokens = judged[..accepted].iter().map(|d| d.token);
        let tail = parent.tail.iter().copied().chain(tokens).chain([token]);
        let prospect = Prospect {
            parent: of,
            depth: parent.depth + 1,
            tail: tail.collect(),
            epoch: parent.epoch.wrapping_add(u64::from(raised)),
            chance,
            stage: Stage::Drafting,
            round: Vec::new(),
            doubts: Vec::new(),
            length: 0,
            outlooks: Vec::new(),
        };
        self.current = self.all.len();
        self.all.push(prospect);
    }

    /// The epoch at which the present text stands.
    pub(crate) fn epoch(&self) -> u64 {
        self.all[self.current].epoch
    }

    /// Entries of the distribution that the present round's next token is drawn from, `most` at most.
    pub(crate) fn entries(&self, most: usize) -> usize {
        if self.all[self.current].chance >= LIKELY {
            most
        } else {
            most.div_ceil(4)
        }
    }

    /// Whether what follows the present text is to be drawn for a round, not only looked at.
    pub(crate) fn drafts(&self) -> bool {
        self.all[self.current].stage == Stage::Drafting
    }

    /// Draft tokens that the present round has, and is to have.
    pub(crate) fn progress(&self) -> (usize, usize) {
        let current = &self.all[self.current];
        (current.round.len(), current.length)
    }

    /// A forward showed what may follow the present text; the most likely comes first.
    pub(crate) fn look(&mut self, guesses: impl Iterator<Item = Guess>) {
        let guesses = guesses.take(GUESSES).map(|guess| Candidate {
            guess,
            taken: false,
        });
        self.all[self.current].outlooks.push(guesses.collect());
    }

    /// Adds a token, in which the draft has this doubt, to the present round. Once that is whole, gives what to send: the tail that it
    /// follows, and the round.
    pub(crate) fn draw(
        &mut self,
        token: DraftToken,
        doubt: Option<f64>,
    ) -> Option<(&[u32], &[DraftToken])> {
        let current = &mut self.all[self.current];
        let outlook = current.outlooks.last_mut().into_iter().flatten();
        for candidate in outlook {
            candidate.taken |= candidate.guess.token == token.token;
        }
        current.doubts.push(doubt);
        current.round.push(token);
        if current.round.len() < current.length {
            return None;
        }
        current.stage = Stage::Sent;
        Some((&current.tail, &current.round))
    }

    /// It was told that the session, now at `epoch`, goes on with `new`: what builds on that is kept.
    pub(crate) fn advance(&mut self, new: &[u32], epoch: u64, unawaited: bool) -> Advanced {
        let is_so = |p: &Prospect| p.tail == new && p.epoch == epoch;
        let Some(root) = self.all.iter().position(is_so) else {
            return Advanced::Lost;
        };
        let mut renamed: Vec<Option<usize>> = vec![None; self.all.len()];
        let (up, share) = (self.all[root].depth, self.all[root].chance);
        let mut kept = Vec::new();
        for (index, mut prospect) in std::mem::take(&mut self.all).into_iter().enumerate() {
            let parent = if index == root {
                Some(0)
            } else {
                renamed[prospect.parent].filter(|_| index > root)
            };
            let Some(parent) = parent else { continue };
            renamed[index] = Some(kept.len());
            prospect.parent = parent;
            prospect.depth -= up;
            prospect.tail.drain(..new.len());
            prospect.chance /= share;
            kept.push(prospect);
        }
        self.all = kept;
        let current = renamed[self.current];
        self.current = current.unwrap_or(0);
        let root = &mut self.all[0];
        if root.stage == Stage::Drafting && unawaited {
            // Too late: the target is taking a step alone. What may follow is known if the draft has begun.
            root.stage = Stage::Alone;
            root.round.clear();
            root.doubts.clear();
            root.length = 0;
            root.outlooks.truncate(1);
            for candidate in root.outlooks.iter_mut().flatten() {
                candidate.taken = false;
            }
            return Advanced::Moved;
        }
        match current {
            Some(_) => Advanced::Kept,
            None => Advanced::Moved,
        }
    }
}

#[cfg(test)]
mod tests;
