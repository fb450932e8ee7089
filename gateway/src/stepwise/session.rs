//! [`Session`]: one request at a stepwise gateway, wherever it runs.
//!
//! What `generation_service`, `opening`, `session` and `attachment` do as tasks that wait, as a state machine on the same
//! decisions.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use specattn_proto::v1::open_response::Event;
use specattn_proto::v1::{
    AttachRequest, Committed, DraftPolicy, FinishReason, OpenRequest, SessionFinished,
};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_proto::{Capability, Fault, SessionId};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Said;
use super::office::{Office, Timer};
use crate::admission::{Ticket, Waiting};
use crate::draft_search::{DraftSearch, HELD, LOOK_AGAIN, SETTLE};
use crate::plan::Plan;
use crate::recipe::Recipe;
use crate::registry::{Assignment, Prefix, Worker, WorkerId};
use crate::session::FRUITLESS_REOPENINGS;
use crate::tally::Tally;
use crate::verify_search::VerifySearch;

/// What a session is: as planned, until its first worker's model makes it complete.
enum What {
    Planned(Box<Plan>),
    Complete(Box<Recipe>),
}

/// Where it stands.
enum Stage {
    InLine(Waiting),
    /// Between two rounds of asking.
    Pausing(VerifySearch),
    Asking(VerifySearch, Worker, Assignment),
    Open(Box<Stay>),
    Over,
}

/// A stay at a verify worker.
struct Stay {
    worker: Worker,
    _assignment: Assignment,
    search: DraftSearch,
    draft: Option<(WorkerId, Assignment)>,
    /// When the draft was asked.
    asked: Instant,
    /// The draft that has just left, and after how long.
    left: Option<(WorkerId, Duration)>,
}

impl Stay {
    fn is_drafted_by(&self, worker: WorkerId) -> bool {
        self.draft.as_ref().is_some_and(|(id, _)| *id == worker)
    }
}

pub(super) struct Session {
    id: SessionId,
    what: What,
    /// Prompt and committed tokens.
    tokens: Vec<u32>,
    tally: Tally,
    reopenings: u32,
    /// Workers lost since the last committed token.
    fruitless: u32,
    capability: Capability,
    _ticket: Option<Ticket>,
    stage: Stage,
    timers: BTreeMap<Timer, Instant>,
    changes: watch::Receiver<u64>,
}

impl Session {
    pub(super) fn new(id: SessionId, plan: Plan, changes: watch::Receiver<u64>) -> Self {
        Self {
            id,
            tokens: plan.prompt.clone(),
            what: What::Planned(Box::new(plan)),
            tally: Tally::default(),
            reopenings: 0,
            fruitless: 0,
            capability: Capability::from_bits([0; 32]),
            _ticket: None,
            stage: Stage::Over,
            timers: BTreeMap::new(),
            changes,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.stage, Stage::Over)
    }

    pub(super) fn is_in_line(&self) -> bool {
        matches!(self.stage, Stage::InLine(_))
    }

    /// Waits in line.
    pub(super) fn wait(&mut self, office: &mut Office, waiting: Waiting) {
        self.stage = Stage::InLine(waiting);
        let patience = office.config.admission.queue_timeout;
        self.set(office, Timer::Turn, office.now + patience);
    }

    /// Begins, if its turn has come.
    pub(super) fn called(&mut self, office: &mut Office) {
        if let Stage::InLine(waiting) = &mut self.stage
            && let Some(ticket) = waiting.called()
        {
            self.begin(office, ticket);
        }
    }

    /// Begins.
    pub(super) fn begin(&mut self, office: &mut Office, ticket: Ticket) {
        self._ticket = Some(ticket);
        let patience = office.config.admission.queue_timeout;
        self.search(office, patience, false);
    }

    /// A timer that was set for `at` is due.
    pub(super) fn due(&mut self, office: &mut Office, timer: Timer, at: Instant) {
        if self.timers.get(&timer) != Some(&at) {
            return;
        }
        self.timers.remove(&timer);
        match (timer, std::mem::replace(&mut self.stage, Stage::Over)) {
            (Timer::Turn, Stage::InLine(waiting)) => self.end(office, waiting.refusal()),
            (Timer::Ask, Stage::Pausing(search)) => self.ask_all(office, search),
            (Timer::Listen, stage) => {
                self.stage = stage;
                self.listen(office);
            }
            (Timer::Seek, Stage::Open(mut stay)) => {
                if let Some((draft, after)) = stay.left.take() {
                    stay.search.left(draft, after, office.now);
                }
                self.stage = Stage::Open(stay);
                self.seek(office);
            }
            (_, stage) => self.stage = stage,
        }
    }

    /// Acts on a change of the registry; without one since the last look, waits for the next.
    pub(super) fn listen(&mut self, office: &mut Office) {
        if !self.changes.has_changed().unwrap_or(false) {
            office.listening.insert(self.id);
            return;
        }
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Pausing(search) => self.ask_all(office, search),
            stage => {
                self.stage = stage;
                self.look(office);
            }
        }
    }

    /// Looks for a verify worker.
    fn search(&mut self, office: &mut Office, patience: Duration, waits_for_workers: bool) {
        let prefix = Prefix::of(&self.tokens);
        let search = VerifySearch::new(prefix, office.now + patience, waits_for_workers);
        let search = search.repeatable(office.seed());
        self.ask_all(office, search);
    }

    /// Begins a round of asking.
    fn ask_all(&mut self, office: &mut Office, mut search: VerifySearch) {
        self.quiet(office);
        search.begin_round(&office.registry);
        self.ask(office, search);
    }

    /// Asks the next worker of a round.
    fn ask(&mut self, office: &mut Office, mut search: VerifySearch) {
        while let Some(worker) = search.next() {
            let request = match &self.what {
                What::Complete(recipe) => recipe.open_request(self.tokens.clone()),
                What::Planned(plan) => match plan.fits(&worker.model) {
                    Ok(()) => plan.open_request(self.id),
                    Err(misfit) => {
                        search.unfit(misfit.into());
                        continue;
                    }
                },
            };
            // No secret: another one for each opening is all that a simulation needs.
            let mut bits = [0; 32];
            bits[..8].copy_from_slice(&office.number().to_le_bytes());
            self.capability = Capability::from_bits(bits);
            let request = OpenRequest {
                draft_capability: self.capability.to_wire(),
                protocol_version: PROTOCOL_VERSION,
                ..request
            };
            let said = Said::Open(worker.id, Box::new(request));
            office.said.push(said);
            let assignment = office.registry.assign(worker.id);
            self.stage = Stage::Asking(search, worker, assignment);
            return;
        }
        match search.pause(office.now) {
            Ok(pause) => {
                let listens = office.now + pause.at_least;
                self.set(office, Timer::Listen, listens);
                self.set(office, Timer::Ask, listens + pause.at_most);
                self.stage = Stage::Pausing(search);
            }
            Err(fault) => self.end(office, fault),
        }
    }

    /// A verify worker did not take the session, or gave it up.
    pub(super) fn refused(&mut self, office: &mut Office, worker: WorkerId, fault: Fault) {
        match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Asking(mut search, asked, _) if asked.id == worker => {
                match search.refused(&office.registry, worker, fault) {
                    Ok(()) => self.ask(office, search),
                    Err(fault) => self.end(office, fault),
                }
            }
            Stage::Open(stay) if stay.worker.id == worker => {
                self.stage = Stage::Open(stay);
                self.reopen(office, fault);
            }
            stage => self.stage = stage,
        }
    }

    /// A worker is gone.
    pub(super) fn lost(&mut self, office: &mut Office, worker: WorkerId) {
        match &self.stage {
            Stage::Asking(_, asked, _) if asked.id == worker => {
                let fault = Fault::Unavailable(format!("{worker} hung up"));
                self.refused(office, worker, fault);
            }
            Stage::Open(stay) if stay.worker.id == worker => {
                let fault = Fault::Unavailable(format!("{worker} was lost"));
                self.refused(office, worker, fault);
            }
            _ => self.detached(office, worker),
        }
    }

    /// Takes an event of a verify worker; one that has lost the session meanwhile is not heard.
    pub(super) fn event(&mut self, office: &mut Office, worker: WorkerId, event: Event) {
        match (std::mem::replace(&mut self.stage, Stage::Over), event) {
            (Stage::Asking(search, asked, assignment), Event::Opened(_)) if asked.id == worker => {
                search.opened(&office.registry, worker);
                if let What::Planned(plan) = &self.what {
                    let recipe = plan.recipe(self.id, "", SystemTime::UNIX_EPOCH, &asked.model);
                    self.what = What::Complete(Box::new(recipe));
                }
                self.stage = Stage::Open(Box::new(Stay {
                    worker: asked,
                    _assignment: assignment,
                    search: DraftSearch::new().repeatable(office.seed()),
                    draft: None,
                    asked: office.now,
                    left: None,
                }));
                self.seek(office);
            }
            (Stage::Open(stay), event) if stay.worker.id == worker => {
                self.stage = Stage::Open(stay);
                match event {
                    Event::Committed(committed) => self.commit(office, committed),
                    Event::Finished(finished) => self.finish(office, finished),
                    Event::Opened(_) | Event::Provisional(_) | Event::RolledBack(_) => {}
                }
            }
            (stage, _) => self.stage = stage,
        }
    }

    fn commit(&mut self, office: &mut Office, committed: Committed) {
        if committed.start != self.tokens.len() as u64 {
            let text = "the worker does not go on where it was";
            return self.end(office, Fault::Internal(text.to_owned()));
        }
        self.fruitless = 0;
        if let Some(stats) = committed.stats {
            self.tally.told(stats);
        }
        self.tokens.extend_from_slice(&committed.token_ids);
        let said = Said::Committed(self.id, committed.token_ids);
        office.said.push(said);
    }

    fn finish(&mut self, office: &mut Office, finished: SessionFinished) {
        let reason = finished.reason();
        self.tally.told(finished.stats.unwrap_or_default());
        if reason == FinishReason::Error {
            let text = "the verify worker gave the session up".to_owned();
            return self.reopen(office, Fault::Unavailable(text));
        }
        let mut stats = self.tally.total();
        if let What::Complete(recipe) = &self.what {
            stats.prompt_tokens = recipe.prompt().len() as u64;
            stats.completion_tokens = self.tokens.len() as u64 - stats.prompt_tokens;
        }
        self.leave(office);
        let said = Said::Finished(self.id, Box::new(stats), self.reopenings);
        office.said.push(said);
    }

    /// Goes on elsewhere, the verify worker being lost.
    fn reopen(&mut self, office: &mut Office, lost: Fault) {
        let is_away = matches!(lost, Fault::Unavailable(_));
        if let Stage::Open(stay) = &self.stage
            && is_away
        {
            office.registry.suspect(stay.worker.id);
        }
        self.leave(office);
        self.tally.reopened();
        self.reopenings += 1;
        self.fruitless += 1;
        if self.fruitless > FRUITLESS_REOPENINGS {
            return self.end(office, lost);
        }
        let patience = office.config.reopen_timeout;
        self.search(office, patience, is_away);
    }

    /// Looks for a draft worker.
    fn seek(&mut self, office: &mut Office) {
        self.quiet(office);
        let Stage::Open(stay) = &mut self.stage else {
            return;
        };
        if drafting(&self.what).is_none() {
            return;
        }
        let chosen = stay
            .search
            .choose(&office.registry, &stay.worker, office.now);
        if let Some((worker, assignment)) = chosen {
            return self.attach(office, (worker.id, assignment));
        }
        office.listening.insert(self.id);
        if let Some(rested) = stay.search.rested() {
            self.set(office, Timer::Seek, rested);
        }
    }

    /// Looks for a better draft worker than the one that is attached, or for any.
    fn look(&mut self, office: &mut Office) {
        let Stage::Open(stay) = &mut self.stage else {
            return;
        };
        let Some((draft, assignment)) = stay.draft.take() else {
            return self.seek(office);
        };
        match office.registry.better_draft(&stay.worker, assignment) {
            Ok((better, assignment)) => {
                self.quiet(office);
                office.said.push(Said::Detach(draft, self.id));
                self.attach(office, (better.id, assignment));
            }
            Err(same) => {
                stay.draft = Some((draft, same));
                self.quiet(office);
                self.set(office, Timer::Listen, office.now + LOOK_AGAIN);
            }
        }
    }

    fn attach(&mut self, office: &mut Office, draft: (WorkerId, Assignment)) {
        let (Stage::Open(stay), What::Complete(recipe)) = (&mut self.stage, &self.what) else {
            return;
        };
        let request = AttachRequest {
            session_id: self.id.to_string(),
            verify_endpoint: stay.worker.endpoint.clone(),
            token_ids: self.tokens.clone(),
            policy: recipe.drafting(),
            max_tokens_total: recipe.max_tokens_total() as u64,
            capability: self.capability.to_wire(),
            protocol_version: PROTOCOL_VERSION,
        };
        let said = Said::Attach(draft.0, stay.worker.id, Box::new(request));
        office.said.push(said);
        stay.asked = office.now;
        stay.draft = Some(draft);
    }

    /// A draft is attached, having measured this round trip to its verify worker.
    pub(super) fn attached(
        &mut self,
        office: &mut Office,
        draft: WorkerId,
        trip: Option<Duration>,
    ) {
        if let Stage::Open(stay) = &self.stage
            && stay.is_drafted_by(draft)
        {
            if let Some(trip) = trip {
                office.registry.heard_round_trip(draft, &stay.worker, trip);
            }
            self.set(office, Timer::Listen, office.now + HELD);
        }
    }

    /// A draft is not attached any more, or never was.
    pub(super) fn detached(&mut self, office: &mut Office, draft: WorkerId) {
        let Stage::Open(stay) = &mut self.stage else {
            return;
        };
        if stay.is_drafted_by(draft) {
            stay.draft = None;
            stay.left = Some((draft, office.now - stay.asked));
            self.quiet(office);
            self.set(office, Timer::Seek, office.now + SETTLE);
        }
    }

    /// There is no session, or no more of it.
    fn end(&mut self, office: &mut Office, fault: Fault) {
        self.leave(office);
        office.said.push(Said::Refused(self.id, fault));
    }

    /// Leaves its verify worker and its draft.
    fn leave(&mut self, office: &mut Office) {
        self.quiet(office);
        if let Stage::Open(stay) = std::mem::replace(&mut self.stage, Stage::Over)
            && let Some((draft, _)) = stay.draft
        {
            office.said.push(Said::Detach(draft, self.id));
        }
    }

    fn set(&mut self, office: &mut Office, timer: Timer, at: Instant) {
        self.timers.insert(timer, at);
        office.timers.insert((at, self.id, timer));
    }

    /// Waits for nothing any more, and takes the registry as it is now.
    fn quiet(&mut self, office: &mut Office) {
        self.timers.clear();
        office.listening.remove(&self.id);
        self.changes.mark_unchanged();
    }
}

fn drafting(what: &What) -> Option<DraftPolicy> {
    match what {
        What::Complete(recipe) => recipe.drafting(),
        What::Planned(_) => None,
    }
}
