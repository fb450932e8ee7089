//! [`Server`]: the hub's routes for one repository, with the faults of hubs and networks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// The commit that the repository is at.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The hash by which a file is stored.
pub(crate) fn etag(file: &str) -> String {
    file.bytes().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// Lengths that the listing tells wrongly.
    announced: BTreeMap<String, usize>,
    revisions: Vec<String>,
    commit: String,
    token: Option<String>,
    /// The next long answer breaks off after so many bytes.
    break_after: Option<usize>,
    asked: usize,
    /// Where transfers began: file and first byte.
    transfers: Vec<(String, usize)>,
    stopped: bool,
}

/// See the module's text. Large files lie elsewhere, as at the real hub: at another address, to which the hub redirects.
pub(crate) struct Server {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let state = State {
            revisions: vec!["main".to_owned(), COMMIT.to_owned()],
            commit: COMMIT.to_owned(),
            ..State::default()
        };
        let state = Arc::new(Mutex::new(state));
        let store = TcpListener::bind("127.0.0.2:0").unwrap();
        let hub = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, storage) = (hub.local_addr().unwrap(), store.local_addr().unwrap());
        for (listener, is_hub) in [(hub, true), (store, false)] {
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let state = Arc::clone(&state);
                    // A client that hangs up early is one that has what it wanted.
                    std::thread::spawn(move || {
                        let _ = answer(&stream, &state, is_hub.then_some(storage));
                    });
                }
            });
        }
        Self { address, state }
    }

    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn put(&self, file: &str, content: Vec<u8>) {
        self.state(|state| state.files.insert(file.to_owned(), content));
    }

    pub(crate) fn remove(&self, file: &str) {
        self.state(|state| state.files.remove(file));
    }

    pub(crate) fn announce(&self, file: &str, length: usize) {
        self.state(|state| state.announced.insert(file.to_owned(), length));
    }

    pub(crate) fn tag(&self, revision: &str) {
        self.state(|state| state.revisions.push(revision.to_owned()));
    }

    pub(crate) fn say_commit(&self, commit: &str) {
        self.state(|state| state.commit = commit.to_owned());
    }

    pub(crate) fn want_token(&self, token: &str) {
        self.state(|state| state.token = Some(token.to_owned()));
    }

    pub(crate) fn break_after(&self, bytes: usize) {
        self.state(|state| state.break_after = Some(bytes));
    }

    /// Answers nobody any more.
    pub(crate) fn stop(&self) {
        self.state(|state| state.stopped = true);
    }

    /// Requests so far.
    pub(crate) fn asked(&self) -> usize {
        self.state(|state| state.asked)
    }

    /// Where transfers of a file began.
    pub(crate) fn ranges(&self, file: &str) -> Vec<usize> {
        self.state(|state| {
            let of_file = state.transfers.iter().filter(|(name, _)| name == file);
            of_file.map(|(_, start)| *start).collect()
        })
    }
}

/// A request, as far as it matters.
struct Request {
    path: String,
    /// First and last byte asked for.
    range: Option<(usize, Option<usize>)>,
    authorization: Option<String>,
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut request = Request {
        path,
        range: None,
        authorization: None,
    };
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_owned()),
            "range" => {
                let (start, end) = value.trim_start_matches("bytes=").split_once('-').unwrap();
                request.range = Some((start.parse().unwrap(), end.parse().ok()));
            }
            _ => {}
        }
    }
    Ok(request)
}

fn answer(
    mut stream: &TcpStream,
    state: &Mutex<State>,
    storage: Option<SocketAddr>,
) -> std::io::Result<()> {
    let request = read(stream)?;
    let mut state = state.lock().unwrap();
    if state.stopped {
        return Ok(());
    }
    state.asked += 1;
    let refuse = |mut stream: &TcpStream, status: &str| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
    };
    let Some(storage) = storage else {
        let file = request.path.trim_start_matches("/store/").to_owned();
        return send(stream, &mut state, &file, &request);
    };
    let wanted = state.token.as_ref().map(|token| format!("Bearer {token}"));
    if wanted.is_some() && request.authorization != wanted {
        return refuse(stream, "401 Unauthorized");
    }
    let known = |revision: &str| state.revisions.iter().any(|known| known == revision);
    if let Some(rest) = request.path.strip_prefix("/api/models/acme/tiny/revision/") {
        let revision = rest.split('?').next().unwrap_or_default();
        if !known(revision) {
            return refuse(stream, "404 Not Found");
        }
        let siblings: Vec<String> = state
            .files
            .iter()
            .map(|(name, content)| {
                let length = state.announced.get(name).copied().unwrap_or(content.len());
                format!("{{\"rfilename\": {name:?}, \"size\": {length}}}")
            })
            .collect();
        let body = format!(
            "{{\"sha\": {:?}, \"siblings\": [{}]}}",
            state.commit,
            siblings.join(", ")
        );
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
    }
    let resolved = request.path.strip_prefix("/acme/tiny/resolve/");
    let Some((revision, file)) = resolved.and_then(|rest| rest.split_once('/')) else {
        return refuse(stream, "404 Not Found");
    };
    if !known(revision) || !state.files.contains_key(file) {
        return refuse(stream, "404 Not Found");
    }
    if file.ends_with(".safetensors") {
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\nLocation: http://{storage}/store/{file}\r\nX-Repo-Commit: {}\r\n\
             X-Linked-Etag: \"{}\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            state.commit,
            etag(file)
        );
    }
    let file = file.to_owned();
    send(stream, &mut state, &file, &request)
}

/// A file, or the part of it that is asked for.
fn send(
    mut stream: &TcpStream,
    state: &mut State,
    file: &str,
    request: &Request,
) -> std::io::Result<()> {
    let content = state.files[file].clone();
    let (start, end) = request.range.unwrap_or((0, None));
    let end = end.map_or(content.len(), |last| (last + 1).min(content.len()));
    if request.range.is_none_or(|(_, last)| last.is_none()) {
        state.transfers.push((file.to_owned(), start));
    }
    let mut part = &content[start..end];
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {start}-{}/{}\r\nETag: \"{}\"\r\n\
         X-Repo-Commit: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        end.saturating_sub(1),
        content.len(),
        etag(file),
        state.commit,
        part.len()
    )?;
    if let Some(most) = state.break_after.take_if(|most| *most < part.len()) {
        part = &part[..most];
    }
    stream.write_all(part)
}
