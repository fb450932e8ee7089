//! `specattn status`: workers, load and sessions of a running gateway.

use std::io::{self, Write};

use serde::Serialize;
use specattn_proto::v1;
use specattn_proto::v1::registry_service_client::RegistryServiceClient;
use specattn_service::channel::Link;

use crate::args::{GatewayArgs, StatusArgs};
use crate::connect;
use crate::error::CliError;
use crate::table::Table;

/// Runs the command.
///
/// # Errors
/// [`CliError::Service`] when the gateway does not answer.
pub async fn run(args: &StatusArgs) -> Result<(), CliError> {
    let status = Gateway::connect(&args.gateway).await?.status().await?;
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

/// A gateway that is asked how things stand.
pub(crate) struct Gateway(RegistryServiceClient<Link>);

impl Gateway {
    pub(crate) async fn connect(args: &GatewayArgs) -> Result<Self, CliError> {
        let gateway = connect::Gateway::new(&args.url, &args.connect)?;
        Ok(Self(RegistryServiceClient::new(gateway.connect().await?)))
    }

    pub(crate) async fn status(&mut self) -> Result<Status, CliError> {
        let answer = self.0.status(v1::StatusRequest {}).await?;
        Ok(Status::from(answer.into_inner()))
    }
}

/// What `--json` prints.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Status {
    pub(crate) workers: Vec<Worker>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) requests_queued: u32,
}

#[derive(Debug, Serialize)]
pub(crate) struct Worker {
    pub(crate) worker_id: String,
    pub(crate) role: &'static str,
    pub(crate) endpoint: String,
    pub(crate) model: String,
    pub(crate) devices: Vec<Device>,
    pub(crate) sessions_assigned: u32,
    pub(crate) sessions_active: u32,
    pub(crate) sessions_max: u32,
    pub(crate) kv_blocks_used: u64,
    pub(crate) kv_blocks_total: u64,
    pub(crate) tokens_total: u64,
    pub(crate) draining: bool,
    pub(crate) heartbeat_age_ms: u64,
}

/// What a worker runs its model on; several devices are the ranks of a split model.
#[derive(Debug, Serialize)]
pub(crate) struct Device {
    id: String,
    name: String,
    memory_bytes: u64,
    /// The slowest way to the worker's other devices; `null` where there are none.
    link: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Session {
    pub(crate) session_id: String,
    pub(crate) mode: &'static str,
    pub(crate) verify_worker_id: String,
    /// `null` while no draft is attached.
    pub(crate) draft_worker_id: Option<String>,
    pub(crate) prompt_tokens: u32,
    pub(crate) completion_tokens: u64,
    pub(crate) age_ms: u64,
}

impl From<v1::StatusResponse> for Status {
    fn from(answer: v1::StatusResponse) -> Self {
        Self {
            workers: answer.workers.into_iter().map(Worker::from).collect(),
            sessions: answer.sessions.into_iter().map(Session::from).collect(),
            requests_queued: answer.gateway.unwrap_or_default().requests_queued,
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
    /// As text for people.
    pub(crate) fn tables(&self) -> String {
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
