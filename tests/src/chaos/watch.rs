//! [`Watch`]: lets faults strike in time, and looks at the processes all the while.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::chaos::fleet::Fleet;
use crate::chaos::memory::Memory;
use crate::chaos::schedule::{Fault, Strike};

/// Time between two looks at the processes.
const LOOK: Duration = Duration::from_secs(1);

/// What was seen.
#[derive(Debug, Default)]
pub struct Watch {
    /// What processes held.
    pub memory: Memory,
    /// Those that ended by themselves: who, when, and their last words.
    pub died: Vec<String>,
    /// Members that a fault has killed.
    killed: BTreeSet<usize>,
}

impl Watch {
    /// Strikes and heals in time, for `duration`.
    pub async fn endure(&mut self, fleet: &mut Fleet, strikes: &[Strike], duration: Duration) {
        let begin = strikes.iter().map(|strike| (strike.at, true, strike));
        let end = strikes.iter().map(|strike| (strike.ends, false, strike));
        let mut events: Vec<_> = begin.chain(end).collect();
        events.sort_by_key(|&(at, begins, _)| (at, begins));
        let start = Instant::now();
        let mut next_look = Duration::ZERO;
        for (at, begins, strike) in events {
            while next_look < at {
                sleep_until(start + next_look).await;
                self.look(fleet, next_look);
                next_look += LOOK;
            }
            sleep_until(start + at).await;
            let kills = strike.fault == Fault::Kill;
            if begins {
                eprintln!(
                    "{:7.1} s: {:?} {} for {:.1?}",
                    at.as_secs_f64(),
                    strike.fault,
                    fleet.members[strike.target].process.name(),
                    strike.ends - strike.at
                );
                fleet.strike(strike);
                if kills {
                    self.killed.insert(strike.target);
                }
            } else {
                fleet.heal(strike);
                if kills {
                    self.killed.remove(&strike.target);
                }
            }
        }
        sleep_until(start + duration).await;
        self.look(fleet, duration);
    }

    fn look(&mut self, fleet: &mut Fleet, at: Duration) {
        for member in fleet.dead() {
            if !self.killed.contains(&member) {
                let process = &mut fleet.members[member].process;
                let (name, log) = (process.name().to_owned(), process.log());
                let died = format!("{name} died by itself {at:?} after the start:\n{log}");
                self.died.push(died);
                process.relaunch();
            }
        }
        for (number, member) in fleet.members.iter().enumerate() {
            let process = &member.process;
            if let Some(bytes) = process.memory() {
                let name = format!("{} {number}", process.name());
                self.memory.note((name, process.pid()), at, bytes);
            }
        }
    }
}
