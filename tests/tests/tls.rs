//! The TLS matrix: on every link, a server with the wrong certificate is told nothing, and a caller with the wrong one is
//! served nothing.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use specattn_proto::v1::{AttachRequest, DraftPolicy};
use specattn_proto::version::PROTOCOL_VERSION;
use specattn_service::channel::{Dialer, Link};
use specattn_tests::certificates::{Authority, Identity, caller, flags};
use specattn_tests::cluster::gateway_at;
use specattn_tests::process::{DRAFT, VERIFY, free_address};
use specattn_tests::trap::Trap;
use specattn_tests::{Process, raw, until};
use tempfile::TempDir;
use tonic::Code;

struct World {
    _dir: TempDir,
    ours: Authority,
    theirs: Authority,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            ours: Authority::new(dir.path(), "ours"),
            theirs: Authority::new(dir.path(), "theirs"),
            _dir: dir,
        }
    }

    /// One server that may be trusted, the first, and all kinds that may not.
    async fn traps(&self) -> Vec<(&'static str, Trap)> {
        vec![
            ("good", Trap::set(Some(&self.ours.good())).await),
            ("stranger", Trap::set(Some(&self.theirs.good())).await),
            ("expired", Trap::set(Some(&self.ours.expired())).await),
            ("misnamed", Trap::set(Some(&self.ours.misnamed())).await),
            ("plain", Trap::set(None).await),
        ]
    }

    /// What a service of ours shows and trusts.
    fn flags(&self) -> Vec<String> {
        flags(&self.ours.good(), &self.ours)
    }

    fn dialer(&self, identity: Option<&Identity>) -> Dialer {
        Dialer::new(caller(identity, &self.ours).load().unwrap(), None)
    }
}

/// Waits until every trap was called, then looks who trusted whom.
async fn only_the_good_was_trusted(link: &str, traps: &[(&str, Trap)]) {
    until(link, || async {
        traps.iter().all(|(_, trap)| trap.callers() > 1) && traps[0].1.trusting() > 0
    })
    .await;
    for (kind, trap) in &traps[1..] {
        assert_eq!(
            trap.trusting(),
            0,
            "{link}: the {kind} server was told something"
        );
    }
}

fn refs(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

fn join(traps: &[(&str, Trap)]) -> String {
    let uris: Vec<_> = traps.iter().map(|(_, trap)| trap.uri()).collect();
    uris.join(",")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn gateways_tell_wrong_workers_nothing() {
    let world = World::new();
    let (verify, draft) = (world.traps().await, world.traps().await);
    let mut line = world.flags();
    line.extend(["--verify-endpoint".to_owned(), join(&verify)]);
    line.extend(["--draft-endpoint".to_owned(), join(&draft)]);
    let _gateway = gateway_at(&free_address(), &refs(&line)).await;
    only_the_good_was_trusted("gateway to verify worker", &verify).await;
    only_the_good_was_trusted("gateway to draft worker", &draft).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn workers_tell_wrong_gateways_nothing() {
    let world = World::new();
    for role in [VERIFY, DRAFT] {
        let traps = world.traps().await;
        let mut workers = Vec::new();
        for (_, trap) in &traps {
            let mut line = world.flags();
            line.extend(["--gateway".to_owned(), trap.uri()]);
            workers.push(Process::worker(role, &refs(&line)).await);
        }
        only_the_good_was_trusted(role, &traps).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn drafts_tell_wrong_verify_workers_nothing() {
    use prost::Message;

    let world = World::new();
    let draft = Process::worker(DRAFT, &refs(&world.flags())).await;
    let link = world.dialer(Some(&world.ours.good()));
    let link = link.connect(&https(&draft)).await.unwrap();
    let traps = world.traps().await;
    for (_, trap) in &traps {
        let attach = AttachRequest {
            session_id: "0".repeat(32),
            verify_endpoint: trap.uri(),
            token_ids: vec![1, 2, 3],
            policy: Some(DraftPolicy {
                draft_length: Some(4),
                ..DraftPolicy::default()
            }),
            max_tokens_total: 60,
            capability: vec![7; 32],
            protocol_version: PROTOCOL_VERSION,
        };
        for _ in 0..2 {
            let message = vec![attach.encode_to_vec()];
            let (answers, status) = raw::call(link.clone(), "DraftService/Attach", message).await;
            assert_eq!((answers, status.code()), (0, Code::Unavailable), "{status}");
        }
    }
    only_the_good_was_trusted("draft to verify worker", &traps).await;
}

#[tokio::test]
async fn clients_tell_wrong_gateways_nothing() {
    let world = World::new();
    let traps = world.traps().await;
    for (kind, trap) in &traps {
        for _ in 0..2 {
            let connected = world.dialer(None).connect(&trap.uri()).await;
            assert_eq!(connected.is_ok(), *kind == "good", "{kind}");
        }
    }
    only_the_good_was_trusted("client to gateway", &traps).await;
    // An authority that only this machine's system would know is not trusted by itself either.
    assert!(Dialer::default().connect(&traps[0].1.uri()).await.is_err());
}

/// An RPC that each service answers to whoever may call it.
const HARMLESS: [(&str, &str); 3] = [
    ("specattn-gateway", "RegistryService/Status"),
    (VERIFY, "VerifyService/VerifyStatus"),
    (DRAFT, "DraftService/DraftStatus"),
];

fn https(process: &Process) -> String {
    process.uri().replacen("http", "https", 1)
}

/// Calls a method over a link that may not come about.
async fn ask(link: Result<Link, specattn_proto::Fault>, method: &str) -> (usize, Code) {
    match link {
        Ok(link) => {
            let (answers, status) = raw::call(link, method, vec![Vec::new()]).await;
            (answers, status.code())
        }
        Err(_) => (0, Code::Unavailable),
    }
}

async fn start(name: &str, flags: &[String]) -> Process {
    if name == "specattn-gateway" {
        gateway_at(&free_address(), &refs(flags)).await
    } else {
        Process::worker(name, &refs(flags)).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn servers_serve_wrong_callers_nothing() {
    let world = World::new();
    let mut flags = world.flags();
    flags.push("--mutual-tls".to_owned());
    for (name, method) in HARMLESS {
        let process = start(name, &flags).await;
        let good = world.dialer(Some(&world.ours.good()));
        let answer = ask(good.connect(&https(&process)).await, method).await;
        assert_eq!(answer, (1, Code::Ok), "{name}");
        let wrong = [
            ("without a certificate", None),
            ("of a stranger", Some(world.theirs.good())),
            ("expired", Some(world.ours.expired())),
        ];
        for (kind, identity) in wrong {
            let dialer = world.dialer(identity.as_ref());
            let answer = ask(dialer.connect(&https(&process)).await, method).await;
            // In TLS 1.3 a client hears of its rejection after it has begun to talk: the code depends on how far it came.
            let refused = answer.0 == 0 && answer.1 != Code::Ok;
            assert!(refused, "{name}: {kind}: {answer:?}");
        }
        let answer = ask(Dialer::default().connect(process.uri()).await, method).await;
        let refused = answer.0 == 0 && answer.1 != Code::Ok;
        assert!(refused, "{name}: in plain text: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_certificate_alone_is_wanted_where_there_is_no_secret() {
    let world = World::new();
    for (name, method) in &HARMLESS[1..] {
        let process = start(name, &world.flags()).await;
        let good = world.dialer(Some(&world.ours.good()));
        let answer = ask(good.connect(&https(&process)).await, method).await;
        assert_eq!(answer, (1, Code::Ok), "{name}");
        let answer = ask(world.dialer(None).connect(&https(&process)).await, method).await;
        assert_eq!(answer, (0, Code::Unauthenticated), "{name}");
    }
}

fn replace(with: &Path, at: &Path) {
    std::fs::copy(with, at).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn changed_certificates_are_taken_up() {
    let world = World::new();
    let identity = world.ours.good();
    let process = start("specattn-gateway", &flags(&identity, &world.ours)).await;
    let method = "RegistryService/Status";
    let ours = world.dialer(None);
    let theirs = Dialer::new(caller(None, &world.theirs).load().unwrap(), None);
    let uri = https(&process);
    let before = ours.connect(&uri).await.unwrap();
    assert!(theirs.connect(&uri).await.is_err());

    let next = world.theirs.good();
    replace(&next.cert, &identity.cert);
    replace(&next.key, &identity.key);
    until("the new certificate", || async {
        theirs.connect(&uri).await.is_ok()
    })
    .await;
    assert!(ours.connect(&uri).await.is_err());
    // Connections of before go on.
    let (answers, _) = raw::call(before, method, vec![Vec::new()]).await;
    assert_eq!(answers, 1);

    // Nonsense is not taken up.
    std::fs::write(&identity.cert, "nonsense").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    assert!(theirs.connect(&uri).await.is_ok());
}
