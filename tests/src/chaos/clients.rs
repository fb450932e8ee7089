//! [`Client`]s that keep a fleet busy, each with habits of its own.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use specattn_proto::Fault;
use tonic::{Code, Status};

use crate::chaos::account::Account;
use crate::chaos::cases::Case;
use crate::client::{Completion, Request, Stream};
use crate::within;

/// How long a client goes on asking for the rest of a session that broke off: on a busy machine, under faults, a long one takes a minute.
const PATIENCE: Duration = Duration::from_secs(180);

/// The pause before it asks again.
const PAUSE: Duration = Duration::from_millis(200);

/// Tokens after which clients with habits act on them, at most.
const RESTLESS: usize = 60;

/// Longest absence of a client that comes back: its session has been suspended by then.
const ABSENCE: u64 = 4_000;

/// What a client does besides reading.
#[derive(Debug, Clone, Copy)]
enum Habit {
    /// Nothing.
    Patient,
    /// It leaves for good.
    Vanishes,
    /// It leaves and comes back after so long.
    Returns(Duration),
    /// It resumes its session while it still reads the first stream: the second one goes on, the first is told so.
    TakesOver,
}

impl Habit {
    fn of(rng: &mut StdRng) -> Self {
        match rng.random_range(0..8) {
            0 => Self::Vanishes,
            1 => Self::Returns(Duration::from_millis(rng.random_range(0..ABSENCE))),
            2 => Self::TakesOver,
            _ => Self::Patient,
        }
    }
}

/// One client: a session after the other.
#[derive(Debug)]
pub struct Client {
    /// Where gateways are.
    pub gateways: Vec<String>,
    /// What it asks.
    pub cases: Arc<Vec<Case>>,
    /// When to begin no more sessions.
    pub stop: Arc<AtomicBool>,
    /// The key of its choices.
    pub seed: u64,
}

/// A session as its client has it: what came, and whether its stream ended well.
type Came = (Completion, Result<bool, Status>);

impl Client {
    /// Runs until told to stop.
    pub async fn run(self) -> Account {
        let mut rng = StdRng::seed_from_u64(self.seed);
        let mut account = Account::default();
        while !self.stop.load(Ordering::Relaxed) {
            self.session(&mut rng, &mut account).await;
        }
        account
    }

    async fn session(&self, rng: &mut StdRng, account: &mut Account) {
        let case = &self.cases[rng.random_range(0..self.cases.len())];
        let gateway = rng.random_range(0..self.gateways.len());
        let habit = Habit::of(rng);
        let acts_at = match habit {
            Habit::Patient => usize::MAX,
            _ => rng.random_range(1..RESTLESS),
        };
        let mut stream = match self.start(gateway, case).await {
            Ok(stream) => stream,
            Err(status) => return refused(&status, account, case).await,
        };
        let (completion, came) = match (habit, stream.until(acts_at).await) {
            (Habit::Vanishes, Ok(false)) => {
                account.vanished += 1;
                return;
            }
            (Habit::Returns(after), Ok(false)) => {
                let left = stream.leave();
                tokio::time::sleep(after).await;
                (left, Err(Status::unavailable("the client was away")))
            }
            (Habit::TakesOver, Ok(false)) => {
                let second = self.resume(gateway, stream.so_far().clone());
                let (came, _) = tokio::join!(second, stream.until(usize::MAX));
                account.taken_over += 1;
                // However the first stream ended, what came of it must be right.
                if let Err(wrong) = case.begins(&stream.leave()) {
                    account
                        .wrong
                        .push(format!("before it was taken over: {wrong}"));
                }
                came
            }
            (_, came) => (stream.leave(), came),
        };
        self.to_the_end((completion, came), gateway, account, case)
            .await;
    }

    /// Sees a session to its end, and takes note of what it came to.
    async fn to_the_end(&self, came: Came, gateway: usize, account: &mut Account, case: &Case) {
        if came.0.started.is_none()
            && let Err(status) = &came.1
        {
            return refused(status, account, case).await;
        }
        account.resumed += u64::from(came.1.is_err());
        let mut history = History::of(&came.0);
        match within(PATIENCE, self.rest(came, gateway, &mut history)).await {
            Some(Ok(completion)) => match case.check(&completion) {
                Ok(()) => account.finished += 1,
                Err(wrong) => account.wrong.push(wrong),
            },
            Some(Err(why)) => account.lost.push(format!("{}: {why} {history}", case.name)),
            None => account
                .lost
                .push(format!("{}: never whole {history}", case.name)),
        }
    }

    /// Asks for what is missing of a session that began, here and there, until it is whole; or why it cannot be had.
    async fn rest(
        &self,
        came: Came,
        gateway: usize,
        history: &mut History,
    ) -> Result<Completion, String> {
        let (mut completion, mut came) = came;
        let mut asked = 0;
        while let Err(status) = came {
            // A gateway that does not hold the session may yet take it over from one that died.
            history.note(format_args!("{} tokens, {status}", completion.tokens.len()));
            if !is_clean(&status) && status.code() != Code::NotFound {
                return Err("refused for good".to_owned());
            }
            tokio::time::sleep(PAUSE).await;
            asked += 1;
            let gateway = (gateway + asked) % self.gateways.len();
            history.note(format_args!("gateway {gateway} is asked"));
            (completion, came) = self.resume(gateway, completion).await;
        }
        Ok(completion)
    }

    async fn start(&self, gateway: usize, case: &Case) -> Result<Stream, Status> {
        let channel = specattn_service::channel::connect(&self.gateways[gateway]).await?;
        case.request.clone().start(channel).await
    }

    /// Asks for what is missing.
    async fn resume(&self, gateway: usize, completion: Completion) -> Came {
        let channel = match specattn_service::channel::connect(&self.gateways[gateway]).await {
            Ok(channel) => channel,
            Err(fault) => return (completion, Err(fault.into())),
        };
        match Request::resume(channel, completion.clone()).await {
            Ok(mut stream) => {
                let came = stream.until(usize::MAX).await;
                (stream.leave(), came)
            }
            Err(status) => (completion, Err(status)),
        }
    }
}

/// What a client went through with a session since it broke off, for reports.
#[derive(Debug)]
struct History {
    session_id: String,
    since: Instant,
    lines: String,
}

impl History {
    fn of(completion: &Completion) -> Self {
        let started = completion.started.as_ref();
        Self {
            session_id: started.map_or_else(String::new, |started| started.session_id.clone()),
            since: Instant::now(),
            lines: String::new(),
        }
    }

    fn note(&mut self, line: fmt::Arguments<'_>) {
        let after = self.since.elapsed().as_secs_f64();
        self.lines.push_str(&format!("\n    {after:.1} s: {line}"));
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "({}; {:.1} s ago it broke off){}",
            self.session_id,
            self.since.elapsed().as_secs_f64(),
            self.lines
        )
    }
}

/// Takes note of a session that never began.
async fn refused(status: &Status, account: &mut Account, case: &Case) {
    if is_clean(status) {
        let label = Fault::from_status(status).label();
        *account.refused.entry(label.to_owned()).or_default() += 1;
    } else {
        account.lost.push(format!("{}: {status}", case.name));
    }
    tokio::time::sleep(PAUSE).await;
}

/// Whether a status, or the connection's own end, says that trying again, here or elsewhere, may help.
fn is_clean(status: &Status) -> bool {
    matches!(
        Fault::from_status(status),
        Fault::Unavailable(_) | Fault::ResourceExhausted { .. }
    )
}
