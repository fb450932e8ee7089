//! [`Fleet`]: several processes of every role, each behind a [`Link`], and what faults do to them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::chaos::disk::Disk;
use crate::chaos::schedule::{Fault, Strike};
use crate::network::{Link, Weather};
use crate::process::{self, DRAFT, GATEWAY, Process, VERIFY, free_address_at, send};
use crate::repeater::Repeater;
use crate::until;

/// How late bytes are on a late link, one way.
const LATENESS: Duration = Duration::from_millis(30);

/// How long a slow process stands still, and then runs.
const SLOWNESS: (Duration, Duration) = (Duration::from_millis(40), Duration::from_millis(10));

/// Where processes listen. Connections come from 127.0.0.1, so none of theirs can take the port of one that is down.
const HOST: &str = "127.0.0.2";

/// What a process is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A gateway.
    Gateway,
    /// A verify worker.
    Verify,
    /// A draft worker.
    Draft,
}

/// A place in the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// What its process is for.
    pub role: Role,
    /// Whether a [`Repeater`] stands before it: of verify workers only.
    pub proxied: bool,
}

/// The fleet.
pub const PLACES: [Place; 7] = [
    Place::of(Role::Gateway),
    Place::of(Role::Gateway),
    Place::of(Role::Verify),
    Place {
        role: Role::Verify,
        proxied: true,
    },
    Place::of(Role::Draft),
    Place::of(Role::Draft),
    Place::of(Role::Draft),
];

impl Place {
    const fn of(role: Role) -> Self {
        let proxied = false;
        Self { role, proxied }
    }
}

/// A process behind its link.
#[derive(Debug)]
pub struct Member {
    /// What it is for.
    pub role: Role,
    /// The process.
    pub process: Process,
    /// Where everyone else reaches it.
    link: Link,
    /// Between link and process, if anything is.
    repeater: Option<Repeater>,
    /// Freezes and thaws a slow process.
    slowing: Option<JoinHandle<()>>,
}

/// All processes in the order of [`PLACES`], and the disk of the session logs.
#[derive(Debug)]
pub struct Fleet {
    /// The processes.
    pub members: Vec<Member>,
    disk: Disk,
}

/// The way to a place, before its process is there.
struct Way {
    role: Role,
    address: String,
    link: Link,
    repeater: Option<Repeater>,
}

impl Way {
    async fn to(place: Place) -> Self {
        let address = free_address_at(HOST);
        let repeater = match place.proxied {
            true => Some(Repeater::to(&format!("http://{address}")).await),
            false => None,
        };
        let first = repeater.as_ref().map(Repeater::address);
        let target: SocketAddr =
            first.unwrap_or_else(|| address.parse().expect("addresses can be read"));
        Self {
            role: place.role,
            address,
            link: Link::to(target).await,
            repeater,
        }
    }
}

impl Fleet {
    /// Starts the processes. Workers register with the first gateway; the second knows them from a list.
    pub async fn start() -> Self {
        let disk = Disk::new();
        let mut ways = Vec::new();
        for place in PLACES {
            ways.push(Way::to(place).await);
        }
        let uris = |role: Role| -> Vec<String> {
            let of_role = ways.iter().filter(|way| way.role == role);
            of_role.map(|way| way.link.uri().to_owned()).collect()
        };
        let gateway = uris(Role::Gateway).remove(0);
        let log_dir = text(disk.path().to_owned());
        let mut lines = Vec::new();
        for way in &ways {
            let line = match way.role {
                Role::Gateway if way.link.uri() == gateway => gateway_line(&log_dir),
                Role::Gateway => {
                    let mut line = gateway_line(&log_dir);
                    let (verify, draft) = (uris(Role::Verify), uris(Role::Draft));
                    line.extend(["--verify-endpoint".to_owned(), verify.join(",")]);
                    line.extend(["--draft-endpoint".to_owned(), draft.join(",")]);
                    line
                }
                Role::Verify => worker_line(process::target(), &gateway),
                Role::Draft => worker_line(process::draft(), &gateway),
            };
            lines.push(line);
        }
        let members = ways.into_iter().zip(lines).map(|(way, mut line)| {
            line.extend(["--advertise".to_owned(), way.link.uri().to_owned()]);
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            let name = match way.role {
                Role::Gateway => GATEWAY,
                Role::Verify => VERIFY,
                Role::Draft => DRAFT,
            };
            Member {
                role: way.role,
                process: Process::launch(name, &way.address, &line),
                link: way.link,
                repeater: way.repeater,
                slowing: None,
            }
        });
        Self {
            members: members.collect(),
            disk,
        }
    }

    /// Where clients reach the gateways.
    pub fn gateways(&self) -> Vec<String> {
        let gateways = self.members.iter().filter(|m| m.role == Role::Gateway);
        gateways.map(|m| m.link.uri().to_owned()).collect()
    }

    /// A fault begins.
    pub fn strike(&mut self, strike: &Strike) {
        let member = &mut self.members[strike.target];
        let pid = member.process.pid();
        match strike.fault {
            Fault::Kill => member.process.kill(),
            Fault::Freeze => send_if_there(pid, "STOP"),
            Fault::Slow => member.slowing = Some(tokio::spawn(slow(pid))),
            Fault::Partition => member.link.set(Weather::Partition),
            Fault::Late => member.link.set(Weather::Late(LATENESS)),
            Fault::Cut => member.link.cut(),
            Fault::Twice => member.say_twice(true),
            Fault::FullDisk => {
                if !self.disk.fill() {
                    self.limit_files(Some(0));
                }
            }
        }
    }

    /// A fault ends.
    pub fn heal(&mut self, strike: &Strike) {
        let member = &mut self.members[strike.target];
        let pid = member.process.pid();
        match strike.fault {
            Fault::Kill => member.process.relaunch(),
            Fault::Freeze => send_if_there(pid, "CONT"),
            Fault::Slow => {
                if let Some(slowing) = member.slowing.take() {
                    slowing.abort();
                }
                send_if_there(pid, "CONT");
            }
            Fault::Partition | Fault::Late => member.link.set(Weather::Clear),
            Fault::Cut => {}
            Fault::Twice => member.say_twice(false),
            Fault::FullDisk => {
                if !self.disk.free() {
                    self.limit_files(None);
                }
            }
        }
    }

    /// How long files of the gateways that run may become. One that is started again has no limit.
    fn limit_files(&mut self, bytes: Option<u64>) {
        for member in &mut self.members {
            if member.role == Role::Gateway && member.process.is_alive() {
                member.process.limit_file_size(bytes);
            }
        }
    }

    /// Waits until every process answers.
    pub async fn is_up(&mut self) {
        for member in &mut self.members {
            until("a process to answer", || async {
                specattn_service::channel::connect(member.process.uri())
                    .await
                    .is_ok()
            })
            .await;
        }
    }

    /// Processes that have ended.
    pub fn dead(&mut self) -> Vec<usize> {
        let members = self.members.iter_mut().enumerate();
        members
            .filter_map(|(index, member)| (!member.process.is_alive()).then_some(index))
            .collect()
    }
}

impl Member {
    fn say_twice(&self, twice: bool) {
        let repeater = self.repeater.as_ref();
        let repeater = repeater.expect("the schedule knows what is proxied");
        repeater.say_twice(twice);
    }
}

fn text(path: PathBuf) -> String {
    path.to_str().expect("paths of tests are UTF-8").to_owned()
}

fn gateway_line(log_dir: &str) -> Vec<String> {
    let tokenizer = text(process::target());
    let line = [
        "--tokenizer",
        &tokenizer,
        "--log-dir",
        log_dir,
        "--log-size-mib",
        "24",
        "--heartbeat-interval-ms",
        "500",
        // Short enough for sessions to be suspended, and taken up again by clients that come back.
        "--linger-ms",
        "2000",
    ];
    line.map(str::to_owned).to_vec()
}

fn worker_line(model: PathBuf, gateway: &str) -> Vec<String> {
    let model = text(model);
    let line = [
        "--model",
        &model,
        "--gateway",
        gateway,
        "--threads",
        "1",
        // Little enough for sessions to crowd each other out.
        "--kv-cache-mib",
        "64",
    ];
    line.map(str::to_owned).to_vec()
}

/// Freezes and thaws a process, without end.
async fn slow(pid: u32) {
    loop {
        send_if_there(pid, "STOP");
        tokio::time::sleep(SLOWNESS.0).await;
        send_if_there(pid, "CONT");
        tokio::time::sleep(SLOWNESS.1).await;
    }
}

/// Sends a signal; one that died by itself is found later.
fn send_if_there(pid: u32, signal: &str) {
    let _ = send(pid, signal);
}
