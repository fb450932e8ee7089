//! `specattn status`: workers, load and sessions of a running gateway.

use std::io::{self, Write};

use serde::Serialize;
use specattn_proto::v1;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;

use crate::args::StatusArgs;
use crate::connect::Gateway;
use crate::error::CliError;

/// Runs the command.
///
/// # Errors
/// [`CliError::Service`] when the gateway does not answer.
pub async fn run(args: &StatusArgs) -> Result<(), CliError> {
    let gateway = Gateway::new(&args.gateway.url, &args.gateway.connect)?;
    let mut client = RegistryServiceClient::new(gateway.connect().await?);
    let answer = client.status(v1::StatusRequest {}).await?.into_inner();
    let status = Status::from(answer);
    let text = if args.json {
        let json = serde_json::to_string(&status).map_err(|e| CliError::Write(e.into()))?;
        json + "\n"
    } else {
        status.tables()
    };
    io::stdout()
        .lock()
        .write_all(text.as_bytes())
        .map_err(CliError::Write)
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Status {
    workers: Vec<Worker>,
    sessions: Vec<Session>,
}

#[derive(Debug, Serialize)]
struct Worker {
    worker_id: String,
    role: &'static str,
    endpoint: String,
    model: String,
    devices: Vec<Device>,
    sessions_assigned: u32,
    sessions_active: u32,
    sessions_max: u32,
    kv_blocks_used: u64,
    kv_blocks_total: u64,
    tokens_total: u64,
    draining: bool,
    heartbeat_age_ms: u64,
}

/// What a worker runs its model on; several devices are the ranks of a split model.
#[derive(Debug, Serialize)]
struct Device {
    id: String,
    name: String,
    memory_bytes: u64,
    /// The slowest way to the worker's other devices; `null` where there are none.
    link: Option<String>,
}

#[derive(Debug, Serialize)]
struct Session {
    session_id: String,
    mode: &'static str,
    verify_worker_id: String,
    /// `null` while no draft is attached.
    draft_worker_id: Option<String>,
    prompt_tokens: u32,
    completion_tokens: u64,
    age_ms: u64,
}

impl From<v1::StatusResponse> for Status {
    fn from(answer: v1::StatusResponse) -> Self {
        Self {
            workers: answer.workers.into_iter().map(Worker::from).collect(),
            sessions: answer.sessions.into_iter().map(Session::from).collect(),
        }
    }
}

impl From<v1::WorkerStatus> for Worker {
    fn from(worker: v1::WorkerStatus) -> Self {
        let role = match worker.role() {
            v1::WorkerRole::Draft => "draft",
            v1::WorkerRole::Verify => "verify",
            v1::WorkerRole::Unspecified => "unknown",
        };
        let load = worker.load.unwrap_or_default();
        let model = worker.model.unwrap_or_default();
        Self {
            worker_id: worker.worker_id,
            role,
            endpoint: worker.endpoint,
            model: model.name,
            devices: model.devices.into_iter().map(Device::from).collect(),
            sessions_assigned: worker.sessions_assigned,
            sessions_active: load.sessions_active,
            sessions_max: load.sessions_max,
            kv_blocks_used: load.kv_blocks_used,
            kv_blocks_total: load.kv_blocks_total,
            tokens_total: load.tokens_total,
            draining: load.draining,
            heartbeat_age_ms: worker.heartbeat_age_ms,
        }
    }
}

impl From<v1::Device> for Device {
    fn from(device: v1::Device) -> Self {
        Self {
            id: device.id,
            name: device.name,
            memory_bytes: device.memory_bytes,
            link: Some(device.link).filter(|link| !link.is_empty()),
        }
    }
}

impl Worker {
    /// `cuda:0,1 NVIDIA H100, 80 GB each, NVLink`.
    fn device(&self) -> String {
        let Some(first) = self.devices.first() else {
            return "-".to_owned();
        };
        let count = self.devices.len();
        let mut text = first.id.clone();
        for other in &self.devices[1..] {
            // Ranks on one CPU have nothing to tell them apart.
            if let Some((_, number)) = other.id.split_once(':') {
                text.extend([",", number]);
            }
        }
        if count > 1 && !first.id.contains(':') {
            text.push_str(&format!(" × {count}"));
        }
        if !first.name.is_empty() {
            text.extend([" ", &first.name]);
        }
        if first.memory_bytes > 0 {
            let gb = (first.memory_bytes as f64 / 1e9).round();
            let each = if count > 1 { " each" } else { "" };
            text.push_str(&format!(", {gb} GB{each}"));
        }
        if let Some(link) = &first.link {
            text.extend([", ", link]);
        }
        text
    }
}

impl From<v1::SessionStatus> for Session {
    fn from(session: v1::SessionStatus) -> Self {
        let mode = match session.mode() {
            v1::Mode::Dense => "dense",
            v1::Mode::Sparse => "sparse",
            v1::Mode::Exact => "exact",
            v1::Mode::Unspecified => "unknown",
        };
        Self {
            session_id: session.session_id,
            mode,
            verify_worker_id: session.verify_worker_id,
            draft_worker_id: Some(session.draft_worker_id).filter(|id| !id.is_empty()),
            prompt_tokens: session.prompt_tokens,
            completion_tokens: session.completion_tokens,
            age_ms: session.age_ms,
        }
    }
}

impl Status {
    fn tables(&self) -> String {
        let mut workers = Table::new([
            "WORKER",
            "ROLE",
            "MODEL",
            "DEVICE",
            "ENDPOINT",
            "STATE",
            "SESSIONS",
            "KV BLOCKS",
            "TOKENS",
            "HEARTBEAT",
        ]);
        for worker in &self.workers {
            workers.row([
                worker.worker_id.clone(),
                worker.role.to_owned(),
                worker.model.clone(),
                worker.device(),
                worker.endpoint.clone(),
                if worker.draining { "draining" } else { "up" }.to_owned(),
                format!("{}/{}", worker.sessions_active, worker.sessions_max),
                format!("{}/{}", worker.kv_blocks_used, worker.kv_blocks_total),
                worker.tokens_total.to_string(),
                seconds(worker.heartbeat_age_ms),
            ]);
        }
        let mut sessions = Table::new([
            "SESSION", "MODE", "VERIFY", "DRAFT", "PROMPT", "OUTPUT", "AGE",
        ]);
        for session in &self.sessions {
            let draft = session.draft_worker_id.as_deref().unwrap_or("-");
            sessions.row([
                session.session_id.clone(),
                session.mode.to_owned(),
                session.verify_worker_id.clone(),
                draft.to_owned(),
                session.prompt_tokens.to_string(),
                session.completion_tokens.to_string(),
                seconds(session.age_ms),
            ]);
        }
        format!(
            "{}\n{}",
            workers.render("no workers"),
            sessions.render("no sessions")
        )
    }
}

fn seconds(millis: u64) -> String {
    format!("{:.1} s", millis as f64 / 1000.0)
}

/// Left-aligned columns, two spaces apart.
struct Table<const COLUMNS: usize> {
    header: [&'static str; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    fn new(header: [&'static str; COLUMNS]) -> Self {
        Self {
            header,
            rows: Vec::new(),
        }
    }

    /// Adds a row. Names come from other processes: control characters must not reach a terminal.
    fn row(&mut self, cells: [String; COLUMNS]) {
        self.rows
            .push(cells.map(|cell| cell.replace(char::is_control, "?")));
    }

    fn render(&self, when_empty: &str) -> String {
        if self.rows.is_empty() {
            return format!("{when_empty}\n");
        }
        let header = self.header.map(str::to_owned);
        let lines = || std::iter::once(&header).chain(&self.rows);
        let widths: [usize; COLUMNS] = std::array::from_fn(|column| {
            lines()
                .map(|cells| cells[column].chars().count())
                .max()
                .unwrap_or(0)
        });
        let mut text = String::new();
        for cells in lines() {
            let padded: Vec<String> = cells
                .iter()
                .zip(widths)
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            text.push_str(padded.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> v1::StatusResponse {
        let worker = |id: &str, role: v1::WorkerRole| v1::WorkerStatus {
            worker_id: id.to_owned(),
            role: role.into(),
            endpoint: "http://127.0.0.1:1".to_owned(),
            model: Some(v1::ModelInfo {
                name: "tar\u{1b}get".to_owned(),
                ..v1::ModelInfo::default()
            }),
            heartbeat_age_ms: 1_250,
            ..v1::WorkerStatus::default()
        };
        v1::StatusResponse {
            workers: vec![
                worker("verify-1", v1::WorkerRole::Verify),
                worker("d", v1::WorkerRole::Draft),
            ],
            gateway: None,
            sessions: vec![v1::SessionStatus {
                session_id: "ab".to_owned(),
                mode: v1::Mode::Sparse.into(),
                verify_worker_id: "verify-1".to_owned(),
                ..v1::SessionStatus::default()
            }],
        }
    }

    #[test]
    fn tables_are_aligned_and_harmless() {
        let text = Status::from(answer()).tables();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        let column = lines[0].find("ROLE").unwrap();
        assert!(lines[1][column..].starts_with("verify "), "{text}");
        assert!(lines[2][column..].starts_with("draft "), "{text}");
        assert!(text.contains("tar?get") && text.contains("1.2 s"), "{text}");
        assert!(lines[5].contains("sparse  verify-1  -"), "{text}");
        let nothing = Status::from(v1::StatusResponse::default()).tables();
        assert_eq!(nothing, "no workers\n\nno sessions\n");
    }

    #[test]
    fn devices_are_told_in_a_line() {
        let device = |id: &str, name: &str, memory_bytes, link: &str| v1::Device {
            id: id.to_owned(),
            name: name.to_owned(),
            memory_bytes,
            link: link.to_owned(),
        };
        let line = |devices: Vec<v1::Device>| {
            let mut answer = answer();
            if let Some(model) = &mut answer.workers[0].model {
                model.devices = devices;
            }
            Status::from(answer).workers[0].device()
        };
        let gpu = |id: &str, link: &str| device(id, "NVIDIA H100", 85_100_000_000, link);
        assert_eq!(line(vec![gpu("cuda:1", "")]), "cuda:1 NVIDIA H100, 85 GB");
        assert_eq!(
            line(vec![gpu("cuda:0", "NVLink"), gpu("cuda:3", "NVLink")]),
            "cuda:0,3 NVIDIA H100, 85 GB each, NVLink"
        );
        assert_eq!(line(vec![device("cpu", "", 0, "")]), "cpu");
        let rank = device("cpu", "", 0, "shared memory");
        assert_eq!(line(vec![rank; 2]), "cpu × 2, shared memory");
        assert_eq!(line(Vec::new()), "-");
    }

    #[test]
    fn json_says_null_for_no_draft() {
        let json = serde_json::to_value(Status::from(answer())).unwrap();
        assert_eq!(
            json["sessions"][0]["draft_worker_id"],
            serde_json::Value::Null
        );
        assert_eq!(json["workers"][1]["role"], "draft");
    }
}
