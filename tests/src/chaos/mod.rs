//! Chaos: a fleet of real processes under seeded faults, clients that never stop, and an account of every session.
//!
//! The faults, their targets and their times follow from the seed ([`mod@schedule`]), as do the requests and the habits of
//! clients; what they meet depends on the machine. What must hold afterwards does not: see [`Verdict::check`].

pub mod account;
pub mod cases;
pub mod clients;
pub mod disk;
pub mod fleet;
pub mod memory;
pub mod schedule;
pub mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_proto::v1::{StatusRequest, StatusResponse};
use tokio::task::JoinSet;

use crate::chaos::account::Account;
use crate::chaos::clients::Client;
use crate::chaos::fleet::{Fleet, PLACES, Role};
use crate::chaos::memory::Growth;
use crate::chaos::schedule::{Fault, Strike, schedule};
use crate::chaos::watch::Watch;
use crate::until;

/// What is to be endured.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The key of faults and requests.
    pub seed: u64,
    /// How long faults strike.
    pub duration: Duration,
    /// Sessions at a time.
    pub clients: u64,
}

/// How it went.
#[derive(Debug)]
pub struct Verdict {
    /// What became of the sessions.
    pub account: Account,
    /// Faults that struck.
    pub strikes: Vec<Strike>,
    /// Processes that ended by themselves: who, when, and their last words.
    pub died: Vec<String>,
    /// Processes that lived long.
    pub growths: Vec<Growth>,
}

impl Verdict {
    /// What does not hold, if anything: every session ended or was refused cleanly, none with other tokens than
    /// undisturbed; no process died by itself; memory is flat. That nothing is left behind was waited for.
    pub fn check(&self) -> Result<(), String> {
        let mut faults = [&self.account.lost, &self.account.wrong, &self.died]
            .map(Vec::clone)
            .concat();
        let grown = self.growths.iter().filter(|growth| !growth.is_flat());
        faults.extend(grown.map(|growth| format!("memory grew: {growth}")));
        if faults.is_empty() {
            Ok(())
        } else {
            Err(faults.join("\n"))
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut kinds: BTreeMap<(Role, Fault), u32> = BTreeMap::new();
        for strike in &self.strikes {
            let role = PLACES[strike.target].role;
            *kinds.entry((role, strike.fault)).or_default() += 1;
        }
        writeln!(f, "{}", self.account)?;
        write!(f, "{} faults:", self.strikes.len())?;
        for ((role, fault), count) in kinds {
            write!(f, " {role:?} {fault:?} {count},")?;
        }
        writeln!(f)?;
        for growth in &self.growths {
            writeln!(f, "{growth}")?;
        }
        Ok(())
    }
}

/// Runs it. Panics where a process does not come up, or something is left behind at the end.
pub async fn run(options: Options) -> Verdict {
    let mut fleet = Fleet::start().await;
    fleet.is_up().await;
    let gateways = fleet.gateways();
    let workers = PLACES.iter().filter(|place| place.role != Role::Gateway);
    let workers = workers.count();
    for gateway in &gateways {
        until("workers to be known", || async {
            let status = status(gateway).await;
            status.is_some_and(|status| status.workers.len() == workers)
        })
        .await;
    }
    let channel = specattn_service::channel::connect(&gateways[0]).await;
    let cases = Arc::new(cases::cases(&channel.expect("the fleet is up")).await);
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for number in 0..options.clients {
        let client = Client {
            gateways: gateways.clone(),
            cases: Arc::clone(&cases),
            stop: Arc::clone(&stop),
            seed: options.seed.wrapping_add(1 + number),
        };
        clients.spawn(client.run());
    }
    let strikes = schedule(options.seed, &PLACES, options.duration);
    let mut watch = Watch::default();
    watch.endure(&mut fleet, &strikes, options.duration).await;
    stop.store(true, Ordering::Relaxed);
    let mut account = Account::default();
    while let Some(client) = clients.join_next().await {
        match client {
            Ok(theirs) => account.add(theirs),
            // It expects of its streams that they continue each other.
            Err(panic) => account.wrong.push(panic.to_string()),
        }
    }
    fleet.is_up().await;
    is_idle(&fleet).await;
    Verdict {
        account,
        strikes,
        died: watch.died,
        growths: watch.memory.growths(),
    }
}

async fn status(gateway: &str) -> Option<StatusResponse> {
    let channel = specattn_service::channel::connect(gateway).await.ok()?;
    let mut client = RegistryServiceClient::new(channel);
    let status = client.status(StatusRequest {}).await;
    Some(status.ok()?.into_inner())
}

/// Waits until no session and no KV block is left anywhere.
async fn is_idle(fleet: &Fleet) {
    for member in &fleet.members {
        match member.role {
            Role::Gateway => {
                until("sessions to end", || async {
                    let status = status(member.process.uri()).await;
                    status.is_some_and(|status| status.sessions.is_empty())
                })
                .await;
            }
            Role::Verify | Role::Draft => Box::pin(member.process.is_idle()).await,
        }
    }
}
