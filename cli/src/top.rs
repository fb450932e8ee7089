//! `specattn top`: workers and sessions of a running gateway as they change, until a key is pressed.
//!
//! Asks what `specattn status` asks, again and again. Where standard output is no terminal it prints the tables of
//! `specattn status` each time instead, so that it can be piped and logged.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Block, Row, Table};
use specattn_proto::Fault;

use crate::args::TopArgs;
use crate::error::CliError;
use crate::status::{Gateway, Session, Status, Worker};

/// Most reports without an answer from the gateway before the command gives up.
const SILENT_REPORTS: u32 = 10;

/// Longest wait for an answer: keys are heard after it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the command.
///
/// # Errors
/// [`CliError::Service`] when the gateway does not answer, [`CliError::Write`] when the terminal does not.
pub async fn run(args: &TopArgs) -> Result<(), CliError> {
    let gateway = Gateway::connect(&args.gateway).await?;
    let interval = Duration::from_millis(args.interval_ms.max(100));
    if io::stdout().is_terminal() {
        let mut terminal = ratatui::try_init().map_err(CliError::Write)?;
        let shown = live(&mut terminal, gateway, &args.gateway.url, interval).await;
        ratatui::restore();
        shown
    } else {
        plain(gateway, interval, args.count).await
    }
}

/// The tables of `specattn status`, `count` times or without end.
async fn plain(
    mut gateway: Gateway,
    interval: Duration,
    count: Option<u64>,
) -> Result<(), CliError> {
    let mut left = count;
    loop {
        let text = gateway.status().await?.tables();
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())
            .and_then(|()| out.write_all(b"\n"))
            .and_then(|()| out.flush())
            .map_err(CliError::Write)?;
        drop(out);
        left = left.map(|left| left.saturating_sub(1));
        if left == Some(0) {
            return Ok(());
        }
        tokio::time::sleep(interval).await;
    }
}

async fn live(
    terminal: &mut ratatui::DefaultTerminal,
    mut gateway: Gateway,
    url: &str,
    interval: Duration,
) -> Result<(), CliError> {
    let mut view = View::new(url);
    let mut silent = 0;
    loop {
        let asked = tokio::time::timeout(ANSWER_TIMEOUT, gateway.status()).await;
        let answer = asked.unwrap_or_else(|_| {
            let silence = Fault::DeadlineExceeded("the gateway does not answer".to_owned());
            Err(silence.into())
        });
        match answer {
            Ok(status) => {
                silent = 0;
                view.take(status, Instant::now());
            }
            Err(error) => {
                silent += 1;
                if silent >= SILENT_REPORTS {
                    return Err(error);
                }
                view.trouble = Some(error.to_string());
            }
        }
        let until = Instant::now() + interval;
        loop {
            terminal
                .draw(|frame| view.draw(frame))
                .map_err(CliError::Write)?;
            match key(until).await? {
                Some(Key::Leave) => return Ok(()),
                Some(Key::Scroll(by)) => view.scroll(by),
                Some(Key::Other) => {}
                None => break,
            }
        }
    }
}

/// What a key asks for.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Leave,
    Scroll(isize),
    /// The terminal changed its size, or the key means nothing.
    Other,
}

/// The next key; `None` when `until` has come.
async fn key(until: Instant) -> Result<Option<Key>, CliError> {
    let waiting = tokio::task::spawn_blocking(move || {
        let left = until.saturating_duration_since(Instant::now());
        match event::poll(left)? {
            true => event::read().map(|event| Some(meaning(&event))),
            false => Ok(None),
        }
    });
    let waited = waiting.await.map_err(io::Error::other);
    waited.and_then(|waited| waited).map_err(CliError::Write)
}

fn meaning(event: &Event) -> Key {
    let Event::Key(key) = event else {
        return Key::Other;
    };
    if key.kind == KeyEventKind::Release {
        return Key::Other;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => Key::Leave,
        KeyCode::Char('c') if control => Key::Leave,
        KeyCode::Up | KeyCode::Char('k') => Key::Scroll(-1),
        KeyCode::Down | KeyCode::Char('j') => Key::Scroll(1),
        KeyCode::PageUp => Key::Scroll(-10),
        KeyCode::PageDown => Key::Scroll(10),
        _ => Key::Other,
    }
}

/// What is on the screen.
struct View {
    url: String,
    status: Status,
    /// Tokens a second, by worker or session.
    rates: BTreeMap<String, f64>,
    /// Tokens so far, by worker or session, when they were seen last.
    seen: Option<(Instant, BTreeMap<String, u64>)>,
    /// Why what is shown is old.
    trouble: Option<String>,
    /// Sessions that are scrolled out at the top.
    skipped: usize,
}

impl View {
    fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            status: Status::default(),
            rates: BTreeMap::new(),
            seen: None,
            trouble: None,
            skipped: 0,
        }
    }

    /// Takes a report of this time.
    fn take(&mut self, status: Status, now: Instant) {
        let workers = status.workers.iter();
        let sessions = status.sessions.iter();
        let tokens: BTreeMap<String, u64> = workers
            .map(|worker| (worker.worker_id.clone(), worker.tokens_total))
            .chain(sessions.map(|s| (s.session_id.clone(), s.completion_tokens)))
            .collect();
        self.rates.clear();
        if let Some((then, before)) = &self.seen {
            let seconds = (now - *then).as_secs_f64().max(1e-3);
            for (id, count) in &tokens {
                if let Some(before) = before.get(id) {
                    let more = count.saturating_sub(*before) as f64;
                    self.rates.insert(id.clone(), more / seconds);
                }
            }
        }
        self.seen = Some((now, tokens));
        self.status = status;
        self.trouble = None;
        self.scroll(0);
    }

    fn scroll(&mut self, by: isize) {
        let most = self.status.sessions.len().saturating_sub(1);
        self.skipped = self.skipped.saturating_add_signed(by).min(most);
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let workers = u16::try_from(self.status.workers.len()).unwrap_or(u16::MAX);
        let [head, top, middle, foot] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(workers.saturating_add(3)),
            Constraint::Min(4),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(self.summary(), head);
        self.draw_workers(frame, top);
        self.draw_sessions(frame, middle);
        let keys = Line::from("q leaves, arrows scroll").style(Style::new().fg(Color::DarkGray));
        frame.render_widget(keys, foot);
    }

    fn summary(&self) -> Line<'_> {
        if let Some(trouble) = &self.trouble {
            return Line::from(format!("no answer: {trouble}")).style(Style::new().fg(Color::Red));
        }
        let output: f64 = self
            .status
            .sessions
            .iter()
            .filter_map(|session| self.rates.get(&session.session_id))
            .sum();
        Line::from(format!(
            "{}  {} workers  {} sessions  {} waiting  {output:.0} tokens/s",
            self.url,
            self.status.workers.len(),
            self.status.sessions.len(),
            self.status.requests_queued,
        ))
    }

    fn rate(&self, id: &str) -> String {
        let rate = self.rates.get(id);
        rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}"))
    }

    fn draw_workers(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = self.status.workers.iter().map(|worker| {
            let style = match worker {
                _ if worker.draining => Style::new().fg(Color::Yellow),
                _ if worker.kv_blocks_used * 10 > worker.kv_blocks_total * 9 => {
                    Style::new().fg(Color::Red)
                }
                _ => Style::new(),
            };
            Row::new(self.worker_cells(worker)).style(style)
        });
        let widths = [
            Constraint::Fill(2),
            Constraint::Fill(2),
            Constraint::Length(9),
            Constraint::Length(11),
            Constraint::Length(16),
            Constraint::Length(9),
        ];
        let header = [
            "WORKER",
            "MODEL",
            "STATE",
            "SESSIONS",
            "KV BLOCKS",
            "TOKENS/S",
        ];
        frame.render_widget(table("Workers", header, rows.collect(), &widths), area);
    }

    fn worker_cells(&self, worker: &Worker) -> [String; 6] {
        [
            worker.worker_id.clone(),
            worker.model.clone(),
            if worker.draining { "draining" } else { "up" }.to_owned(),
            format!("{}/{}", worker.sessions_active, worker.sessions_max),
            format!("{}/{}", worker.kv_blocks_used, worker.kv_blocks_total),
            self.rate(&worker.worker_id),
        ]
        .map(clean)
    }

    fn draw_sessions(&self, frame: &mut Frame<'_>, area: Rect) {
        let sessions = self.status.sessions.iter().skip(self.skipped);
        let rows = sessions.map(|session| Row::new(self.session_cells(session)));
        let widths = [
            Constraint::Length(10),
            Constraint::Length(7),
            Constraint::Fill(1),
            Constraint::Fill(1),
            Constraint::Length(7),
            Constraint::Length(7),
            Constraint::Length(9),
            Constraint::Length(8),
        ];
        let header = [
            "SESSION", "MODE", "VERIFY", "DRAFT", "PROMPT", "OUTPUT", "TOKENS/S", "AGE",
        ];
        frame.render_widget(table("Sessions", header, rows.collect(), &widths), area);
    }

    fn session_cells(&self, session: &Session) -> [String; 8] {
        [
            session.session_id.chars().take(8).collect(),
            session.mode.to_owned(),
            session.verify_worker_id.clone(),
            session
                .draft_worker_id
                .clone()
                .unwrap_or_else(|| "-".to_owned()),
            session.prompt_tokens.to_string(),
            session.completion_tokens.to_string(),
            self.rate(&session.session_id),
            format!("{:.1} s", session.age_ms as f64 / 1000.0),
        ]
        .map(clean)
    }
}

fn table<'a, const COLUMNS: usize>(
    title: &'a str,
    header: [&'a str; COLUMNS],
    rows: Vec<Row<'a>>,
    widths: &'a [Constraint; COLUMNS],
) -> Table<'a> {
    let header = Row::new(header).style(Style::new().add_modifier(Modifier::BOLD));
    Table::new(rows, widths)
        .header(header)
        .block(Block::bordered().title(title))
}

/// Names come from other processes: control characters must not reach a terminal.
fn clean(cell: String) -> String {
    cell.replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use specattn_proto::v1;

    use super::*;

    fn status(tokens: u64) -> Status {
        Status::from(v1::StatusResponse {
            workers: vec![v1::WorkerStatus {
                worker_id: "verify-1".to_owned(),
                role: v1::WorkerRole::Verify.into(),
                model: Some(v1::ModelInfo {
                    name: "tar\u{1b}get".to_owned(),
                    ..v1::ModelInfo::default()
                }),
                load: Some(v1::WorkerLoad {
                    tokens_total: tokens,
                    kv_blocks_used: 3,
                    kv_blocks_total: 64,
                    ..v1::WorkerLoad::default()
                }),
                ..v1::WorkerStatus::default()
            }],
            sessions: vec![v1::SessionStatus {
                session_id: "0123456789abcdef".to_owned(),
                mode: v1::Mode::Exact.into(),
                completion_tokens: tokens / 2,
                ..v1::SessionStatus::default()
            }],
            gateway: Some(v1::GatewayStatus {
                requests_queued: 7,
                ..v1::GatewayStatus::default()
            }),
        })
    }

    #[test]
    fn the_screen_shows_rates_since_the_last_report() {
        let mut view = View::new("http://gateway:7400");
        let start = Instant::now();
        view.take(status(1_000), start);
        view.take(status(1_500), start + Duration::from_secs(2));
        let mut terminal = Terminal::new(TestBackend::new(100, 14)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let text = terminal.backend().to_string();
        for wanted in [
            "http://gateway:7400  1 workers  1 sessions  7 waiting  125 tokens/s",
            "verify-1",
            "tar?get",
            "3/64",
            "250",
            "01234567",
            "exact",
            "q leaves",
        ] {
            assert!(text.contains(wanted), "{wanted} is missing in\n{text}");
        }
    }

    #[test]
    fn scrolling_stays_within_the_sessions() {
        let mut view = View::new("");
        view.take(status(1), Instant::now());
        view.scroll(10);
        assert_eq!(view.skipped, 0);
        view.scroll(-10);
        assert_eq!(view.skipped, 0);
    }

    #[test]
    fn keys_mean_what_they_say() {
        let key = |code, modifiers| meaning(&Event::Key(event::KeyEvent::new(code, modifiers)));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Key::Leave);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Key::Leave);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), Key::Other);
        assert_eq!(key(KeyCode::Down, KeyModifiers::NONE), Key::Scroll(1));
    }
}
