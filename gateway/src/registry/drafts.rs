//! Which draft worker a session gets, and when it moves to another: by load and by distance to its verify worker.

use std::sync::Arc;
use std::time::Duration;

use specattn_proto::v1::WorkerRole;

use super::{Assignment, Record, Records, Registry, Worker, WorkerId, misfit};

/// A draft's way to the verify worker that weighs as much as a full worker.
const FAR: Duration = Duration::from_millis(200);

/// Ways up to this are all the same: within a region they are shorter.
const NEAR: Duration = Duration::from_millis(10);

/// The gain for which an attached draft is left for another, in what one session adds to that: moving must even the load out,
/// not turn it over.
const WORTH_MOVING: f64 = 0.5;

/// How much of a way is still believed for each session that went elsewhere since it was measured. One that was measured in a bad
/// moment would else never be measured again; one that is truly long is tried by a session in some dozens.
const DOUBT: f64 = 0.95;

/// A draft's way to a verify worker.
#[derive(Debug, Clone, Copy)]
pub(super) struct Way {
    /// The round trip, as the draft worker told it last.
    round_trip: Duration,
    /// Sessions of the verify worker that were given to other drafts since.
    passed_over: u32,
}

impl Way {
    /// As far as it was measured: sessions that have a draft move by no doubts.
    fn measured(&self) -> Duration {
        self.round_trip
    }

    /// As far as a session without a draft believes it.
    fn believed(&self) -> Duration {
        let passed_over = i32::try_from(self.passed_over).unwrap_or(i32::MAX);
        self.round_trip.mul_f64(DOUBT.powi(passed_over))
    }
}

impl Registry {
    /// Assigns a session of `verify` to the best draft worker among those that are `eligible`.
    pub(crate) fn assign_draft(
        self: &Arc<Self>,
        verify: &Worker,
        eligible: impl Fn(WorkerId) -> bool,
    ) -> Option<(Worker, Assignment)> {
        let mut records = self.records();
        let id = records.best_draft(verify, eligible, Way::believed)?.0;
        for (_, record) in records.by_id.iter_mut().filter(|(other, _)| **other != id) {
            if let Some(way) = record.ways.get_mut(&verify.endpoint) {
                way.passed_over = way.passed_over.saturating_add(1);
            }
        }
        let record = records.by_id.get_mut(&id)?;
        record.assigned += 1;
        let worker = record.worker.clone();
        drop(records);
        Some((worker, self.assignment(id)))
    }

    /// Moves a session of `verify` from its draft worker to one that suits it clearly better, or gives the assignment
    /// back. Sessions move one after another, each seeing where the ones before it went.
    pub(crate) fn better_draft(
        self: &Arc<Self>,
        verify: &Worker,
        assignment: Assignment,
    ) -> Result<(Worker, Assignment), Assignment> {
        let here = assignment.id;
        let mut records = self.records();
        let Some((better, cost)) = records.best_draft(verify, |id| id != here, Way::measured)
        else {
            drop(records);
            return Err(assignment);
        };
        let added = records.by_id.get(&better).map_or(0.0, |record| {
            record.fullness_with(record.assigned.saturating_add(1)) - record.fullness()
        });
        let stays = records.by_id.get(&here).is_some_and(|record| {
            let now = record.draft_cost(&verify.endpoint, record.assigned, Way::measured);
            record.takes_sessions() && now < cost + WORTH_MOVING * added
        });
        let moved = match records.by_id.get_mut(&better) {
            Some(record) if !stays => {
                record.assigned += 1;
                Some(record.worker.clone())
            }
            _ => None,
        };
        drop(records);
        match moved {
            Some(worker) => Ok((worker, self.assignment(better))),
            None => Err(assignment),
        }
    }

    /// A draft worker told how far it is from a verify worker.
    pub(crate) fn heard_round_trip(&self, draft: WorkerId, verify: &Worker, time: Duration) {
        let mut records = self.records();
        let known: Vec<String> = records
            .by_id
            .iter()
            .filter(|(id, _)| id.role == WorkerRole::Verify)
            .map(|(_, record)| record.worker.endpoint.clone())
            .collect();
        if let Some(record) = records.by_id.get_mut(&draft) {
            // Endpoints that are gone must not gather.
            record.ways.retain(|endpoint, _| known.contains(endpoint));
            let way = Way {
                round_trip: time,
                passed_over: 0,
            };
            record.ways.insert(verify.endpoint.clone(), way);
        }
    }
}

impl Record {
    /// What a session of the verify worker at `endpoint` would find here, less being better.
    fn draft_cost(&self, endpoint: &str, assigned: u32, length: fn(&Way) -> Duration) -> f64 {
        let way = self.ways.get(endpoint).map(length).unwrap_or_default();
        let far = way.saturating_sub(NEAR).as_secs_f64() / FAR.as_secs_f64();
        self.fullness_with(assigned) + far
    }
}

impl Records {
    /// The eligible draft worker that suits a session of `verify` best, and what the session would find there.
    fn best_draft(
        &self,
        verify: &Worker,
        eligible: impl Fn(WorkerId) -> bool,
        length: fn(&Way) -> Duration,
    ) -> Option<(WorkerId, f64)> {
        let drafts = self.by_id.iter().filter(|(id, record)| {
            id.role == WorkerRole::Draft
                && record.takes_sessions()
                && eligible(**id)
                && misfit(&record.worker.model, &verify.model).is_none()
        });
        let costs = drafts.map(|(id, record)| {
            let cost =
                record.draft_cost(&verify.endpoint, record.assigned.saturating_add(1), length);
            (record.suspect, cost, record.assigned, *id)
        });
        let best = costs.min_by(|a, b| {
            let by_cost = a.1.total_cmp(&b.1);
            a.0.cmp(&b.0).then(by_cost).then(a.2.cmp(&b.2))
        });
        best.map(|(_, cost, _, id)| (id, cost))
    }
}
