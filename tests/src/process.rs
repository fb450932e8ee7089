//! [`Process`]: one service as a process of its own.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use specattn_proto::v1::draft_service_client::DraftServiceClient;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::{DraftStatusRequest, VerifyStatusRequest, WorkerLoad};
use tonic::transport::Channel;

use crate::binaries::{self, workspace};
use crate::{soon, until};

/// The gateway's binary.
pub const GATEWAY: &str = "specattn-gateway";

/// The verify worker's binary.
pub const VERIFY: &str = "specattn-verify";

/// The draft worker's binary.
pub const DRAFT: &str = "specattn-draft";

/// Lines of a service's log that are kept: its last ones.
const LOG_LINES: usize = 20_000;

/// Those of them that are shown when a test fails.
const REPORTED_LINES: usize = 200;

/// A running service. Dropping it kills it; the log of a test that fails is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    arguments: Vec<String>,
    address: String,
    child: Child,
    uri: String,
    log: Log,
}

/// The last lines of a service's log.
type Log = Arc<Mutex<VecDeque<String>>>;

/// The folder of the bundled target.
pub fn target() -> PathBuf {
    workspace().join("models/target")
}

/// The folder of the bundled draft.
pub fn draft() -> PathBuf {
    workspace().join("models/draft")
}

/// An address nobody listens on now.
pub fn free_address() -> String {
    free_address_at("127.0.0.1")
}

/// The same of another name of this host.
pub fn free_address_at(host: &str) -> String {
    let listener = TcpListener::bind((host, 0)).expect("loopback has a free port");
    listener
        .local_addr()
        .expect("a bound socket has an address")
        .to_string()
}

impl Process {
    /// Starts a worker with the bundled model of its role, and waits until it answers.
    pub async fn worker(name: &str, arguments: &[&str]) -> Self {
        let folder = if name == VERIFY { target() } else { draft() };
        Self::worker_with(name, &folder, arguments).await
    }

    /// Starts a worker with the model in `folder`, and waits until it answers.
    pub async fn worker_with(name: &str, folder: &Path, arguments: &[&str]) -> Self {
        let folder = folder.to_str().expect("paths of tests are UTF-8");
        // One thread each: two engines that spin on two cores starve each other.
        let mut line = vec!["--model", folder, "--threads", "1", "--kv-cache-mib", "256"];
        line.extend(arguments);
        Self::start(name, &line).await
    }

    /// Starts the service `name`, and waits until it answers.
    pub async fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_at(name, &free_address(), arguments).await
    }

    /// Starts the service `name` at `address`, and waits until it answers.
    pub async fn start_at(name: &str, address: &str, arguments: &[&str]) -> Self {
        let mut process = Self::launch(name, address, arguments);
        soon(name, process.wait_ready()).await;
        process
    }

    /// Starts the service `name` at `address`, and does not wait.
    pub fn launch(name: &str, address: &str, arguments: &[&str]) -> Self {
        let log = Log::default();
        let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
        Self {
            child: spawn(name, address, &arguments, &log),
            name: name.to_owned(),
            arguments,
            address: address.to_owned(),
            uri: format!("http://{address}"),
            log,
        }
    }

    /// Starts it again as it was started, at the same address, and does not wait. It must have ended.
    pub fn relaunch(&mut self) {
        self.child = spawn(&self.name, &self.address, &self.arguments, &self.log);
    }

    async fn wait_ready(&mut self) {
        while specattn_service::channel::connect(&self.uri).await.is_err() {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                panic!("{} ended with {status} before it answered", self.name);
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let log = self.log.lock().unwrap();
        Vec::from_iter(log.iter().map(String::as_str)).join("\n")
    }

    /// Where it answers.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The address that it listens at.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A connection to it.
    pub async fn channel(&self) -> Channel {
        soon("connecting", specattn_service::channel::connect(&self.uri))
            .await
            .unwrap()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a killed child ends");
    }

    /// Sends a signal by name (`TERM`, `STOP`, `CONT`).
    pub fn signal(&self, name: &str) {
        send(self.pid(), name).expect("a child can be sent signals");
    }

    /// Sets how long a file it writes may become; `None`: as long as the disk has room.
    pub fn limit_file_size(&self, bytes: Option<u64>) {
        let soft = bytes.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string());
        let status = Command::new("prlimit")
            .args([
                format!("--pid={}", self.child.id()),
                format!("--fsize={soft}:"),
            ])
            .status()
            .expect("prlimit can be run");
        assert!(status.success());
    }

    /// Waits until it ended by itself; its exit code.
    pub async fn ended(&mut self) -> Option<i32> {
        soon("the end of a process", async {
            loop {
                if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                    return status.code();
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
        .await
    }

    /// Its binary's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The memory it holds now, in bytes; none when it has ended.
    pub fn memory(&self) -> Option<u64> {
        self.status("VmRSS:")
    }

    /// The most memory it has held so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.status("VmHWM:").expect("the kernel reports the peak")
    }

    /// Bytes that the kernel says of it under this name.
    fn status(&self, name: &str) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
        Some(kib << 10)
    }

    /// What the worker says of its load.
    pub async fn load(&self) -> WorkerLoad {
        let channel = self.channel().await;
        let load = if self.name == VERIFY {
            let mut client = VerifyServiceClient::new(channel);
            let status = client.verify_status(VerifyStatusRequest {}).await.unwrap();
            status.into_inner().load
        } else {
            let mut client = DraftServiceClient::new(channel);
            let status = client.draft_status(DraftStatusRequest {}).await.unwrap();
            status.into_inner().load
        };
        load.expect("a worker reports its load")
    }

    /// Waits until the worker holds no session and no KV block.
    pub async fn is_idle(&self) {
        until("an idle worker", || async {
            let load = self.load().await;
            load.sessions_active == 0 && load.kv_blocks_used == 0
        })
        .await;
    }
}

/// Starts a service, and keeps its log.
fn spawn(name: &str, address: &str, arguments: &[String], log: &Log) -> Child {
    let log_level = format!("{}_LOG_LEVEL", name.replace('-', "_").to_uppercase());
    let mut child = Command::new(binaries::path(name))
        .args(["--listen", address])
        .args(arguments)
        .env(log_level, "info")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let lines = child.stderr.take().expect("stderr is piped");
    let kept = Arc::clone(log);
    std::thread::spawn(move || {
        for line in BufReader::new(lines).lines().map_while(Result::ok) {
            let mut kept = kept.lock().unwrap();
            if kept.len() == LOG_LINES {
                kept.pop_front();
            }
            kept.push_back(line);
        }
    });
    child
}

/// Sends a signal by name to a process; fails where there is none.
pub(crate) fn send(pid: u32, name: &str) -> Result<(), Errno> {
    let signal = match name {
        "TERM" => Signal::TERM,
        "STOP" => Signal::STOP,
        "CONT" => Signal::CONT,
        other => panic!("tests send no {other}"),
    };
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    kill_process(pid.expect("a process has an id"), signal)
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of {} at {}", self.name, self.uri);
            let log = self.log.lock().unwrap();
            for line in log.range(log.len().saturating_sub(REPORTED_LINES)..) {
                eprintln!("{line}");
            }
        }
    }
}
