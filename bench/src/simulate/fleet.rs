//! [`run`]: a fleet from its first session to its last.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Exp1};
use specattn_cli::bench::arrivals::{Load, Poisson};
use specattn_cli::bench::request_timing::Timed;
use specattn_cli::bench::tally::LatencyTarget;
use specattn_draft::LookaheadMode;
use specattn_draft::stepwise as draft;
use specattn_gateway::Config;
use specattn_gateway::stepwise::{Said, Stepwise, WorkerId};
use specattn_proto::v1::{SessionStats, WorkerRole};
use specattn_proto::{Fault, SessionId};
use specattn_verify::stepwise as verify;
use specattn_worker::Limits;

use crate::simulate::agenda::Agenda;
use crate::simulate::cost::Cost;
use crate::simulate::network::{Network, Stream};
use crate::simulate::node::{Life, Message, Node, Party, Sent, Worker};
use crate::simulate::report::{Outcomes, Report};
use crate::simulate::script;
use crate::simulate::workload::Workload;

/// Time between two heartbeats of a worker.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Deaths of workers, and what follows.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    /// Mean time that a worker lives.
    pub mean_life: Duration,
    /// Until others notice that one is gone.
    pub notice: Duration,
    /// Until there is another in its place.
    pub repair: Duration,
}

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Verify workers, and what their forwards take.
    pub verify: (usize, Cost),
    /// Draft workers, likewise.
    pub draft: (usize, Cost),
    /// Share of tokens on which the draft agrees with the target.
    pub agreement: f64,
    /// Most sessions of a worker.
    pub max_sessions: u32,
    /// What bounds a worker's step.
    pub limits: Limits,
    /// How long a session waits for its draft.
    pub draft_timeout: Duration,
    /// Whether drafts run ahead of verdicts.
    pub lookahead: LookaheadMode,
    /// What the gateway allows and waits for.
    pub gateway: Config,
    /// How messages travel.
    pub network: Network,
    /// Whether workers die.
    pub faults: Option<Faults>,
    /// What is asked.
    pub workload: Workload,
    /// What a good request keeps within.
    pub target: LatencyTarget,
    /// Load before figures are taken.
    pub warmup: Duration,
}

enum Event {
    Arrival,
    Deliver(Party, Party, Message),
    WakeGateway,
    WakeWorker(Life),
    Heartbeat(Life),
    Die(Life),
    /// The gateway hears of a death.
    Mourn(WorkerId),
    /// The gateway asked a worker of whose death it had heard already.
    Unreachable(SessionId, WorkerId),
    Return(usize),
    /// The time in which figures are taken begins, or ends.
    Window,
}

/// A session as its client sees it.
struct Client {
    due: Duration,
    tokens: Vec<(Duration, u32)>,
    /// The last token, and how many there are: the next one follows from both.
    last: (u32, usize),
}

struct Fleet<'a> {
    plan: &'a Plan,
    origin: Instant,
    now: Duration,
    agenda: Agenda<Event>,
    streams: BTreeMap<(Party, Party), Stream>,
    rng: StdRng,
    nodes: Vec<Node>,
    lives: BTreeMap<WorkerId, Life>,
    gateway: Stepwise,
    gateway_wake: Option<Duration>,
    clients: BTreeMap<SessionId, Client>,
    arrivals: Option<Poisson>,
    asked: u64,
    outcomes: Outcomes,
}

/// Runs it; `tell` hears now and then how far it is, from 0 to 1.
///
/// # Errors
/// The gateway needs a Tokio runtime, and gets none.
pub fn run(plan: &Plan, tell: &mut dyn FnMut(f64)) -> anyhow::Result<Report> {
    let began = Instant::now();
    let seed = plan.workload.seed;
    let mut fleet = Fleet {
        plan,
        origin: began,
        now: Duration::ZERO,
        agenda: Agenda::default(),
        streams: BTreeMap::new(),
        rng: StdRng::seed_from_u64(script::mixed(seed ^ 0x5eed)),
        nodes: Vec::new(),
        lives: BTreeMap::new(),
        gateway: Stepwise::new(plan.gateway.clone(), seed)?,
        gateway_wake: None,
        clients: BTreeMap::new(),
        arrivals: None,
        asked: 0,
        outcomes: Outcomes::new(plan.warmup..plan.workload.until, plan.target),
    };
    fleet.start()?;
    fleet.go(tell)?;
    let events = fleet.agenda.noted();
    Ok(fleet.outcomes.report(&fleet.nodes, events, began.elapsed()))
}

impl Fleet<'_> {
    fn worker(&self, node: usize) -> Worker {
        let plan = self.plan;
        if node < plan.verify.0 {
            let setup = verify::Setup {
                limits: plan.limits,
                max_sessions: plan.max_sessions,
                draft_timeout: plan.draft_timeout,
            };
            let model = script::model(plan.verify.1, 1.0);
            Worker::verify(verify::Stepwise::new(model, &setup))
        } else {
            let model = script::model(plan.draft.1, plan.agreement);
            let (limits, most) = (plan.limits, plan.max_sessions);
            Worker::draft(draft::Stepwise::new(model, limits, most, plan.lookahead))
        }
    }

    fn start(&mut self) -> anyhow::Result<()> {
        for node in 0..self.plan.verify.0 + self.plan.draft.0 {
            let worker = self.worker(node);
            self.nodes.push(Node::new(node, worker));
            self.enlist(node)?;
        }
        self.agenda.note(self.plan.warmup, Event::Window);
        self.agenda.note(self.plan.workload.until, Event::Window);
        match self.plan.workload.load {
            Load::Rate(rate) => {
                self.arrivals = Some(Poisson::new(rate, self.plan.workload.seed));
                self.next_arrival();
            }
            Load::Concurrency(clients) => {
                (0..clients).for_each(|_| self.agenda.note(Duration::ZERO, Event::Arrival));
            }
        }
        Ok(())
    }

    /// Registers a worker that has come up, and says when it dies.
    fn enlist(&mut self, node: usize) -> anyhow::Result<()> {
        let node = &mut self.nodes[node];
        let Some(worker) = &node.worker else {
            return Ok(());
        };
        let role = node.role;
        let host = if role == WorkerRole::Verify {
            "verify"
        } else {
            "draft"
        };
        let endpoint = format!("http://{host}-{}:1", node.life.node);
        let (model, load) = (worker.model_info(), worker.load());
        let id = self.gateway.join(role, endpoint, model, load)?;
        node.id = Some(id);
        self.lives.insert(id, node.life);
        // Workers do not come up in step.
        let first = HEARTBEAT.mul_f64(self.rng.random::<f64>());
        let beat = Event::Heartbeat(node.life);
        self.agenda.note(self.now + first, beat);
        if let Some(faults) = self.plan.faults {
            let lives: f64 = Exp1.sample(&mut self.rng);
            let dies = self.now + faults.mean_life.mul_f64(lives);
            self.agenda.note(dies, Event::Die(node.life));
        }
        Ok(())
    }

    fn next_arrival(&mut self) {
        let until = self.plan.workload.until;
        let next = self.arrivals.as_mut().and_then(Iterator::next);
        match next.filter(|&at| at < until) {
            Some(at) => self.agenda.note(at, Event::Arrival),
            None => self.arrivals = None,
        }
    }

    /// Until nobody asks any more and every session is over; then lets what is under way arrive.
    fn go(&mut self, tell: &mut dyn FnMut(f64)) -> anyhow::Result<()> {
        let until = self.plan.workload.until;
        let mut told = 0;
        while let Some((at, event)) = self.agenda.take() {
            let asking = self.arrivals.is_some() || self.now < until;
            let is_over = !asking && self.clients.is_empty();
            let follows = matches!(event, Event::Deliver(..) | Event::WakeWorker(_));
            if is_over && !follows {
                continue;
            }
            self.now = at;
            if at.as_secs() > told {
                told = at.as_secs();
                tell(at.as_secs_f64() / until.as_secs_f64());
            }
            self.happen(event)?;
        }
        Ok(())
    }

    fn happen(&mut self, event: Event) -> anyhow::Result<()> {
        let time = self.origin + self.now;
        match event {
            Event::Arrival => {
                self.arrive();
                self.next_arrival();
            }
            // What a worker would have sent after its death.
            Event::Deliver(Party::Worker(life), ..) if !self.lives_on(life) => {}
            // What is sent to a former life reaches nobody; its sender learns from the lost connection.
            Event::Deliver(_, Party::Worker(life), _) if !self.lives_on(life) => {}
            Event::Deliver(from, Party::Gateway, message) => self.tell_gateway(from, message),
            Event::Deliver(from, to, Message::Ping(since)) => {
                self.send(to, (self.now, from, Message::Pong(since)));
            }
            Event::Deliver(from, Party::Worker(life), message) => {
                if self.nodes[life.node].take(from, message, self.now) {
                    self.turn(life.node);
                }
            }
            Event::WakeGateway => {
                if self.gateway_wake == Some(self.now) {
                    self.gateway_wake = None;
                    self.gateway.wake(time);
                    self.hear_gateway();
                }
            }
            Event::WakeWorker(life) => {
                // Meanwhile it may have been woken by a message, or have died.
                if self.lives_on(life) && self.nodes[life.node].wake == Some(self.now) {
                    self.turn(life.node);
                }
            }
            Event::Heartbeat(life) => {
                let node = &self.nodes[life.node];
                // A dead worker's beats end; they begin anew when it returns.
                if let (Some(worker), Some(id)) = (&node.worker, node.id)
                    && node.life == life
                {
                    self.gateway.report(id, worker.load(), time);
                    self.agenda
                        .note(self.now + HEARTBEAT, Event::Heartbeat(life));
                    self.hear_gateway();
                }
            }
            Event::Die(life) => self.die(life),
            Event::Mourn(id) => {
                self.lives.remove(&id);
                self.gateway.lost(id, time);
                self.hear_gateway();
            }
            Event::Unreachable(session, worker) => {
                let fault = Fault::Unavailable("nobody answers there".to_owned());
                self.gateway.refused(session, worker, fault, time);
                self.gateway.detached(session, worker, time);
                self.hear_gateway();
            }
            Event::Window => self.outcomes.mark(&self.nodes, self.now),
            Event::Return(node) => {
                let worker = self.worker(node);
                self.nodes[node].revive(worker);
                self.enlist(node)?;
                self.hear_gateway();
            }
        }
        Ok(())
    }

    fn lives_on(&self, life: Life) -> bool {
        let node = &self.nodes[life.node];
        node.life == life && node.worker.is_some()
    }

    fn arrive(&mut self) {
        let asked = self.plan.workload.asked(self.asked);
        let id = SessionId::from_bits(self.asked.into());
        self.asked += 1;
        let client = Client {
            due: self.now,
            tokens: Vec::new(),
            last: asked.last,
        };
        self.clients.insert(id, client);
        let time = self.origin + self.now;
        self.gateway.arrive(id, &asked.client, asked.request, time);
        self.hear_gateway();
    }

    fn tell_gateway(&mut self, from: Party, message: Message) {
        let time = self.origin + self.now;
        let Party::Worker(life) = from else {
            return;
        };
        let Some(id) = self.nodes[life.node].id else {
            return;
        };
        match message {
            Message::Refused(session, fault) => self.gateway.refused(session, id, fault, time),
            Message::Event(session, event) => self.gateway.event(session, id, *event, time),
            Message::Attached(session, trip) => self.gateway.attached(session, id, trip, time),
            Message::Detached(session) => self.gateway.detached(session, id, time),
            _ => {}
        }
        self.hear_gateway();
    }

    /// Does what the gateway says, and notes when it wants to be woken.
    fn hear_gateway(&mut self) {
        for said in self.gateway.said() {
            let (worker, message) = match said {
                Said::Open(verify, request) => match request.session_id.parse() {
                    Ok(session) => (verify, Message::Open(session, request)),
                    Err(_) => continue,
                },
                Said::Attach(draft, verify, request) => {
                    let session = request.session_id.parse();
                    match (session, self.lives.get(&verify)) {
                        (Ok(session), Some(&verify)) => {
                            (draft, Message::Attach(session, verify, request))
                        }
                        _ => continue,
                    }
                }
                Said::Detach(draft, session) => (draft, Message::Detach(session)),
                Said::Committed(session, tokens) => {
                    self.committed(session, &tokens);
                    continue;
                }
                Said::Finished(session, stats, reopenings) => {
                    self.outcomes.reopened += u64::from(reopenings > 0);
                    self.ended(session, Ok(*stats));
                    continue;
                }
                Said::Refused(session, fault) => {
                    self.ended(session, Err(fault.label()));
                    continue;
                }
            };
            match (self.lives.get(&worker), &message) {
                (Some(&life), _) => {
                    self.send(Party::Gateway, (self.now, Party::Worker(life), message));
                }
                // Chosen before its loss was heard of, and asked after it.
                (None, Message::Open(session, _) | Message::Attach(session, ..)) => {
                    let unreachable = Event::Unreachable(*session, worker);
                    self.agenda.note(self.now, unreachable);
                }
                (None, _) => {}
            }
        }
        let wake = self.gateway.next_wake();
        let wake = wake.map(|at| at.saturating_duration_since(self.origin).max(self.now));
        if let Some(at) = wake
            && self.gateway_wake.is_none_or(|noted| at < noted)
        {
            self.gateway_wake = Some(at);
            self.agenda.note(at, Event::WakeGateway);
        }
    }

    fn committed(&mut self, session: SessionId, tokens: &[u32]) {
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        client.tokens.push((self.now, tokens.len() as u32));
        for &token in tokens {
            let (last, len) = client.last;
            self.outcomes.wrong_tokens += u64::from(token != script::next(last, len - 1));
            client.last = (token, len + 1);
        }
    }

    fn ended(&mut self, session: SessionId, outcome: Result<SessionStats, &'static str>) {
        if let Some(client) = self.clients.remove(&session) {
            self.outcomes.take(&Timed {
                due: client.due,
                end: self.now,
                tokens: client.tokens,
                outcome,
            });
            let closed = matches!(self.plan.workload.load, Load::Concurrency(_));
            if closed && self.now < self.plan.workload.until {
                // Not in the same instant: a fleet that refuses must not be asked without end.
                self.agenda
                    .note(self.now + Duration::from_micros(100), Event::Arrival);
            }
        }
    }

    fn send(&mut self, from: Party, (at, to, message): (Duration, Party, Message)) {
        let between = from != Party::Gateway && to != Party::Gateway;
        // A step's messages are handed over when it begins; pings overtake them.
        let mut alone = Stream::default();
        let stream = match message {
            Message::Ping(_) | Message::Pong(_) => &mut alone,
            _ => self.streams.entry((from, to)).or_default(),
        };
        let arrival = stream.arrival(&self.plan.network, between, at, &mut self.rng);
        self.agenda.note(arrival, Event::Deliver(from, to, message));
    }

    fn turn(&mut self, node: usize) {
        let node = &mut self.nodes[node];
        let sent: Sent = node.turn(self.origin, self.now);
        let life = node.life;
        if let Some(at) = node.wake {
            self.agenda.note(at, Event::WakeWorker(life));
        }
        for sent in sent {
            self.send(Party::Worker(life), sent);
        }
    }

    fn die(&mut self, life: Life) {
        let Some(faults) = self
            .plan
            .faults
            .filter(|_| self.nodes[life.node].life == life)
        else {
            return;
        };
        self.outcomes.deaths += 1;
        let (noticed, node) = (self.now + faults.notice, &mut self.nodes[life.node]);
        let role = node.role;
        if let Some(id) = node.id {
            self.agenda.note(noticed, Event::Mourn(id));
        }
        node.die(self.now);
        for peer in &self.nodes {
            if peer.role != role {
                let to = Party::Worker(peer.life);
                let lost = Event::Deliver(Party::Gateway, to, Message::Lost(life));
                self.agenda.note(noticed, lost);
            }
        }
        // The streams of a life end with it.
        let gone = Party::Worker(life);
        self.streams
            .retain(|(from, to), _| *from != gone && *to != gone);
        let back = Event::Return(life.node);
        self.agenda
            .note(noticed.max(self.now + faults.repair), back);
    }
}
