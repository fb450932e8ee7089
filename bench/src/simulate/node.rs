//! [`Node`]: a worker in virtual time: one of the services' `Stepwise` with an inbox, busy while its forward runs.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use specattn_draft::{RoundTrips, stepwise as draft};
use specattn_gateway::stepwise::WorkerId;
use specattn_proto::v1::{
    AttachRequest, ModelInfo, OpenRequest, OpenResponse, SpeculateRequest, SpeculateResponse,
    WorkerLoad, WorkerRole,
};
use specattn_proto::{Fault, SessionId};
use specattn_verify::stepwise as verify;
use specattn_worker::clock;

/// A worker's life: which node's, and how often it had died before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Life {
    /// The node.
    pub node: usize,
    /// Deaths before.
    pub deaths: u32,
}

/// Who sends and receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// The gateway.
    Gateway,
    /// A worker.
    Worker(Life),
}

/// A message under way; a worker takes those of its role only.
#[derive(Debug)]
pub enum Message {
    /// Gateway to verify worker: open a session.
    Open(SessionId, Box<OpenRequest>),
    /// Gateway to draft worker: take up a session that is open there.
    Attach(SessionId, Life, Box<AttachRequest>),
    /// Gateway to draft worker: leave a session.
    Detach(SessionId),
    /// Draft to verify worker, on the stream of this attachment.
    Speculate(u64, Box<SpeculateRequest>),
    /// Draft to verify worker: that stream is closed.
    Leave(u64),
    /// Draft to verify worker at this time: answer at once, whatever the engine does.
    Ping(Duration),
    /// Verify worker to draft: the answer to what was sent then.
    Pong(Duration),
    /// Verify worker to draft, on the same stream.
    Answer(u64, Box<SpeculateResponse>),
    /// Verify worker to draft: that stream is closed.
    Unlinked(u64),
    /// All streams to that worker are gone.
    Lost(Life),
    /// Verify worker to gateway: a session was not opened, or failed.
    Refused(SessionId, Fault),
    /// Verify worker to gateway: an event of a session.
    Event(SessionId, Box<OpenResponse>),
    /// Draft worker to gateway: attached, to a verify worker that is so far.
    Attached(SessionId, Option<Duration>),
    /// Draft worker to gateway: not attached any more, or never was.
    Detached(SessionId),
}

/// What a worker sends, to whom and when.
pub type Sent = Vec<(Duration, Party, Message)>;

/// A worker of either role.
#[derive(Debug)]
pub enum Worker {
    /// A target, and its links by the draft's end.
    Verify(Box<VerifyWorker>),
    /// A draft, and its attachments.
    Draft(Box<DraftWorker>),
}

/// A verify worker, and whose end its links have.
#[derive(Debug)]
pub struct VerifyWorker {
    worker: verify::Stepwise,
    links: BTreeMap<(Life, u64), u64>,
    ends: BTreeMap<u64, (Life, u64)>,
}

/// A draft worker, and where its attachments lead.
#[derive(Debug)]
pub struct DraftWorker {
    worker: draft::Stepwise,
    attachments: BTreeMap<u64, Attachment>,
    trips: BTreeMap<Life, RoundTrips>,
}

#[derive(Debug)]
struct Attachment {
    session: SessionId,
    verify: Life,
    is_welcome: bool,
}

impl VerifyWorker {
    fn take(&mut self, from: Party, message: Message, now: Duration, sent: &mut Sent) {
        match (from, message) {
            (_, Message::Open(session, request)) => {
                if let Err(fault) = self.worker.open(*request) {
                    sent.push((now, Party::Gateway, Message::Refused(session, fault)));
                }
            }
            (Party::Worker(draft), Message::Speculate(key, request)) => {
                let end = (draft, key);
                if let Some(&link) = self.links.get(&end) {
                    return self.worker.propose(link, *request);
                }
                match self.worker.join(*request) {
                    Ok(link) => {
                        self.links.insert(end, link);
                        self.ends.insert(link, end);
                    }
                    Err(_) => sent.push((now, from, Message::Unlinked(key))),
                }
            }
            (Party::Worker(draft), Message::Leave(key)) => self.leave((draft, key)),
            (_, Message::Lost(life)) => {
                let of_life = (life, 0)..=(life, u64::MAX);
                let ends: Vec<_> = self.links.range(of_life).map(|(&end, _)| end).collect();
                ends.into_iter().for_each(|end| self.leave(end));
            }
            _ => {}
        }
    }

    fn leave(&mut self, end: (Life, u64)) {
        if let Some(link) = self.links.remove(&end) {
            self.ends.remove(&link);
            self.worker.leave(link, None);
        }
    }

    fn collect(&mut self, now: Duration, sent: &mut Sent) {
        let (links, ends) = (&mut self.links, &mut self.ends);
        self.worker.said(|said| {
            let (to, message) = match said {
                verify::Said::Event(session, event) => {
                    (Party::Gateway, Message::Event(session, Box::new(event)))
                }
                verify::Said::Failed(session, fault) => {
                    (Party::Gateway, Message::Refused(session, fault))
                }
                verify::Said::Answer(link, answer) => match ends.get(&link) {
                    Some(&(draft, key)) => {
                        (Party::Worker(draft), Message::Answer(key, Box::new(answer)))
                    }
                    None => return,
                },
                verify::Said::Unlinked(link, _) => match ends.remove(&link) {
                    Some(end) => {
                        links.remove(&end);
                        (Party::Worker(end.0), Message::Unlinked(end.1))
                    }
                    None => return,
                },
            };
            sent.push((now, to, message));
        });
    }
}

impl DraftWorker {
    fn take(&mut self, message: Message, now: Duration, sent: &mut Sent) {
        match message {
            Message::Attach(session, verify, request) => match self.worker.attach(*request) {
                Ok((key, join)) => {
                    let attachment = Attachment {
                        session,
                        verify,
                        is_welcome: false,
                    };
                    self.attachments.insert(key, attachment);
                    let verify = Party::Worker(verify);
                    sent.push((now, verify, Message::Ping(now)));
                    let join = Message::Speculate(key, Box::new(join));
                    sent.push((now, verify, join));
                }
                Err(_) => sent.push((now, Party::Gateway, Message::Detached(session))),
            },
            // Who asks for it, or has lost the session by itself, is not told.
            Message::Detach(session) => self.end(now, sent, false, |_, at| at.session == session),
            Message::Answer(key, answer) => {
                if let Some(attachment) = self.attachments.get_mut(&key)
                    && !std::mem::replace(&mut attachment.is_welcome, true)
                {
                    let trips = self.trips.get(&attachment.verify);
                    let trip = trips.and_then(RoundTrips::shortest);
                    let attached = Message::Attached(attachment.session, trip);
                    sent.push((now, Party::Gateway, attached));
                }
                if self.worker.answer(key, *answer).is_err() {
                    self.end(now, sent, true, |at, _| at == key);
                }
            }
            Message::Unlinked(key) => self.end(now, sent, true, |at, _| at == key),
            Message::Lost(life) => {
                self.trips.remove(&life);
                self.end(now, sent, false, |_, at| at.verify == life);
            }
            _ => {}
        }
    }

    /// Ends attachments; tells verify workers and, if wanted, the gateway.
    fn end(
        &mut self,
        now: Duration,
        sent: &mut Sent,
        tells_gateway: bool,
        which: impl Fn(u64, &Attachment) -> bool,
    ) {
        let (worker, mut ended) = (&mut self.worker, Vec::new());
        self.attachments.retain(|&key, attachment| {
            let ends = which(key, attachment);
            if ends {
                worker.detach(key);
                ended.push((key, attachment.verify, attachment.session));
            }
            !ends
        });
        for (key, verify, session) in ended {
            sent.push((now, Party::Worker(verify), Message::Leave(key)));
            if tells_gateway {
                sent.push((now, Party::Gateway, Message::Detached(session)));
            }
        }
    }

    fn collect(&mut self, now: Duration, sent: &mut Sent) {
        let (attachments, mut failed) = (&self.attachments, Vec::new());
        self.worker.said(|said| match said {
            draft::Said::Proposal(key, proposal) => {
                if let Some(at) = attachments.get(&key) {
                    let message = Message::Speculate(key, Box::new(proposal));
                    sent.push((now, Party::Worker(at.verify), message));
                }
            }
            draft::Said::Detached(key, _) => failed.push(key),
        });
        if !failed.is_empty() {
            self.end(now, sent, true, |key, _| failed.contains(&key));
        }
    }
}

impl Worker {
    /// A verify worker without sessions.
    pub fn verify(worker: verify::Stepwise) -> Self {
        Self::Verify(Box::new(VerifyWorker {
            worker,
            links: BTreeMap::new(),
            ends: BTreeMap::new(),
        }))
    }

    /// A draft worker without sessions.
    pub fn draft(worker: draft::Stepwise) -> Self {
        Self::Draft(Box::new(DraftWorker {
            worker,
            attachments: BTreeMap::new(),
            trips: BTreeMap::new(),
        }))
    }

    /// What it is for.
    pub fn role(&self) -> WorkerRole {
        match self {
            Self::Verify(_) => WorkerRole::Verify,
            Self::Draft(_) => WorkerRole::Draft,
        }
    }

    /// What it runs.
    pub fn model_info(&self) -> &ModelInfo {
        match self {
            Self::Verify(at) => at.worker.model_info(),
            Self::Draft(at) => at.worker.model_info(),
        }
    }

    /// What it would report.
    pub fn load(&self) -> WorkerLoad {
        match self {
            Self::Verify(at) => at.worker.load(),
            Self::Draft(at) => at.worker.load(),
        }
    }

    fn take(&mut self, from: Party, message: Message, now: Duration, sent: &mut Sent) {
        match self {
            Self::Verify(at) => at.take(from, message, now, sent),
            Self::Draft(at) => at.take(message, now, sent),
        }
    }

    fn step(&mut self) -> Option<Option<Instant>> {
        match self {
            Self::Verify(at) => at.worker.step(),
            Self::Draft(at) => at.worker.step(),
        }
    }

    fn collect(&mut self, now: Duration, sent: &mut Sent) {
        match self {
            Self::Verify(at) => at.collect(now, sent),
            Self::Draft(at) => at.collect(now, sent),
        }
    }
}

/// A worker's place in a fleet.
#[derive(Debug)]
pub struct Node {
    /// Who it is.
    pub life: Life,
    /// What it is for.
    pub role: WorkerRole,
    /// The worker, while it lives.
    pub worker: Option<Worker>,
    /// The gateway's name for it.
    pub id: Option<WorkerId>,
    inbox: VecDeque<(Party, Message)>,
    busy_until: Duration,
    /// When it is to be looked at again.
    pub wake: Option<Duration>,
    /// Time spent in forwards, the one under way counted whole.
    busy: Duration,
    /// Prompt tokens taken from others' work, and sessions preempted, in former lives.
    pub before: (u64, u64),
}

impl Node {
    /// A node with a worker.
    pub fn new(node: usize, worker: Worker) -> Self {
        Self {
            life: Life { node, deaths: 0 },
            role: worker.role(),
            worker: Some(worker),
            id: None,
            inbox: VecDeque::new(),
            busy_until: Duration::ZERO,
            wake: None,
            busy: Duration::ZERO,
            before: (0, 0),
        }
    }

    /// Time spent in forwards until `now`.
    pub fn busy_until(&self, now: Duration) -> Duration {
        self.busy - self.busy_until.saturating_sub(now)
    }

    /// What former lives and this one took from others' work and preempted.
    pub fn shared_and_preempted(&self) -> (u64, u64) {
        let load = self.worker.as_ref().map(Worker::load).unwrap_or_default();
        let (shared, preempted) = (load.prefix_tokens_total, load.preemptions_total);
        (self.before.0 + shared, self.before.1 + preempted)
    }

    /// The worker dies, and everything it held. What it was running is run no further.
    pub fn die(&mut self, now: Duration) {
        self.before = self.shared_and_preempted();
        self.busy = self.busy_until(now);
        self.busy_until = now;
        self.worker = None;
        self.id = None;
        self.inbox.clear();
        self.wake = None;
    }

    /// Another worker in its place.
    pub fn revive(&mut self, worker: Worker) {
        self.life.deaths += 1;
        self.worker = Some(worker);
    }

    /// Takes a message; whether the worker can look at it now.
    pub fn take(&mut self, from: Party, message: Message, now: Duration) -> bool {
        match (message, from, &mut self.worker) {
            (Message::Pong(since), Party::Worker(life), Some(Worker::Draft(draft))) => {
                draft.trips.entry(life).or_default().note(now - since);
                false
            }
            (message, ..) => {
                self.inbox.push_back((from, message));
                self.busy_until <= now
            }
        }
    }

    /// Lets the worker take its messages and one step; what it sends. `origin` is where virtual time begins.
    pub fn turn(&mut self, origin: Instant, now: Duration) -> Sent {
        let mut sent = Sent::new();
        let Some(worker) = &mut self.worker else {
            return sent;
        };
        clock::set(origin + now);
        for (from, message) in self.inbox.drain(..) {
            worker.take(from, message, now, &mut sent);
        }
        worker.collect(now, &mut sent);
        self.wake = match worker.step() {
            None => {
                let end = clock::now() - origin;
                self.busy += end - now;
                self.busy_until = end;
                worker.collect(end, &mut sent);
                Some(end)
            }
            // A deadline that has passed is looked at in the next instant.
            Some(until) => until.map(|until| {
                let until = until.saturating_duration_since(origin);
                until.max(now + Duration::from_micros(1))
            }),
        };
        sent
    }
}
