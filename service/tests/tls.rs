//! A server by TLS behind its guard: who gets through with which certificate and secret, and that changed files are taken up.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use specattn_proto::Fault;
use specattn_service::Secrets;
use specattn_service::channel::{Dialer, Link};
use specattn_service::guard::{Access, Peers};
use specattn_service::security::{SecurityArgs, TlsArgs};
use specattn_service::server::{Server, ServerConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// The files of an authority and of one certificate of it, for 127.0.0.1.
struct Files {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

fn files(dir: &Path, name: &str) -> Files {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, &issuer).unwrap();
    let file = |kind: &str| dir.join(format!("{name}.{kind}"));
    std::fs::write(file("ca"), issuer.pem()).unwrap();
    std::fs::write(file("cert"), cert.pem()).unwrap();
    std::fs::write(file("key"), key.serialize_pem()).unwrap();
    Files {
        ca: file("ca"),
        cert: file("cert"),
        key: file("key"),
    }
}

impl Files {
    fn args(&self, with_identity: bool) -> TlsArgs {
        TlsArgs {
            tls_cert: with_identity.then(|| self.cert.clone()),
            tls_key: with_identity.then(|| self.key.clone()),
            tls_ca: Some(self.ca.clone()),
            tls_server_name: None,
        }
    }

    fn dialer(&self, with_identity: bool) -> Dialer {
        Dialer::new(self.args(with_identity).load().unwrap(), None)
    }
}

/// A server whose only service is health's twin, for peers alone.
async fn serve(files: &Files, mutual_tls: bool, peers: Peers) -> (String, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let security = SecurityArgs {
        tls: files.args(true),
        mutual_tls,
        ..SecurityArgs::default()
    };
    let config = ServerConfig {
        drain_timeout: Duration::from_millis(50),
        security: security.load().unwrap(),
        peers,
        ..ServerConfig::default()
    };
    let uri = config.endpoint(&listener).unwrap();
    assert!(uri.starts_with("https://"));
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let metrics = prometheus_client::registry::Registry::default();
    let server = Server::new()
        .with_metrics(metrics)
        .method("/grpc.health.v1.Health/Check", Access::Peers);
    tokio::spawn(async move { server.serve(listener, &config, token).await.unwrap() });
    (uri, shutdown)
}

/// What the health service says over a link that may not come about.
async fn ask(link: Result<Link, Fault>) -> &'static str {
    let Ok(link) = link else {
        return "no connection";
    };
    let mut client = HealthClient::new(link);
    match client.check(HealthCheckRequest::default()).await {
        Ok(_) => "served",
        Err(status) => Fault::from_status(&status).label(),
    }
}

#[tokio::test]
async fn certificates_and_secrets_open_the_door() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (files(dir.path(), "ours"), files(dir.path(), "theirs"));

    let (uri, _stop) = serve(&ours, false, Peers::Certified).await;
    assert_eq!(ask(ours.dialer(true).connect(&uri).await).await, "served");
    let nameless = ask(ours.dialer(false).connect(&uri).await).await;
    assert_eq!(nameless, "unauthenticated");
    assert_eq!(
        ask(theirs.dialer(false).connect(&uri).await).await,
        "no connection"
    );
    let plain = uri.replacen("https", "http", 1);
    assert_ne!(ask(Dialer::default().connect(&plain).await).await, "served");

    let (uri, _stop) = serve(&ours, true, Peers::Certified).await;
    assert_eq!(ask(ours.dialer(true).connect(&uri).await).await, "served");
    for (tls, identity) in [(&ours, false), (&theirs, true)] {
        let stranger = TlsArgs {
            tls_ca: Some(ours.ca.clone()),
            ..tls.args(identity)
        };
        let stranger = Dialer::new(stranger.load().unwrap(), None);
        assert_ne!(ask(stranger.connect(&uri).await).await, "served");
    }

    let secrets = |text: &str| Secrets::of(text).unwrap();
    let (uri, _stop) = serve(&ours, false, Peers::Secrets(vec![secrets(SECRET)])).await;
    let tls = || ours.args(false).load().unwrap();
    let right = Dialer::new(tls(), Some(secrets(SECRET)));
    assert_eq!(ask(right.connect(&uri).await).await, "served");
    let wrong = Dialer::new(tls(), Some(secrets(&SECRET.replace('0', "1"))));
    assert_eq!(ask(wrong.connect(&uri).await).await, "unauthenticated");
    // A certificate is no secret.
    assert_eq!(
        ask(ours.dialer(true).connect(&uri).await).await,
        "unauthenticated"
    );
}

#[tokio::test]
async fn changed_files_are_taken_up_by_new_connections() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (files(dir.path(), "ours"), files(dir.path(), "theirs"));
    let (uri, _stop) = serve(&ours, false, Peers::Anyone).await;
    let before = ours.dialer(false);
    let standing = before.connect(&uri).await;
    std::fs::copy(&theirs.cert, &ours.cert).unwrap();
    std::fs::copy(&theirs.key, &ours.key).unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(
        ask(theirs.dialer(false).connect(&uri).await).await,
        "served"
    );
    assert_eq!(ask(before.connect(&uri).await).await, "no connection");
    assert_eq!(ask(standing).await, "served");
}
