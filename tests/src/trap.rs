//! [`Trap`]: a server that says nothing and notes whether it was trusted with anything.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::certificates::Identity;

/// What happened to a trap.
#[derive(Debug, Default)]
struct Seen {
    callers: AtomicUsize,
    trusting: AtomicUsize,
}

/// A listening server.
#[derive(Debug)]
pub struct Trap {
    address: SocketAddr,
    seen: Arc<Seen>,
}

impl Trap {
    /// A trap that shows `identity`; `None`: one that cannot speak TLS.
    pub async fn set(identity: Option<&Identity>) -> Self {
        let acceptor = identity.map(|identity| {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let cert = CertificateDer::from_pem_file(&identity.cert).unwrap();
            let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
            let mut config = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![cert], key)
                .unwrap();
            config.alpn_protocols = vec![b"h2".to_vec()];
            TlsAcceptor::from(Arc::new(config))
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Seen::default());
        let noted = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                noted.callers.fetch_add(1, Ordering::SeqCst);
                let (noted, acceptor) = (Arc::clone(&noted), acceptor.clone());
                tokio::spawn(async move {
                    let mut bytes = [0; 3];
                    let said = match acceptor {
                        Some(acceptor) => match acceptor.accept(stream).await {
                            Ok(mut stream) => stream.read_exact(&mut bytes).await.is_ok(),
                            Err(_) => false,
                        },
                        // In plain text: the beginning of HTTP/2, not of a TLS handshake.
                        None => stream.read_exact(&mut bytes).await.is_ok() && &bytes == b"PRI",
                    };
                    if said {
                        noted.trusting.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        Self { address, seen }
    }

    /// Where it listens, as an https URI.
    pub fn uri(&self) -> String {
        format!("https://{}", self.address)
    }

    /// How many called.
    pub fn callers(&self) -> usize {
        self.seen.callers.load(Ordering::SeqCst)
    }

    /// How many of them sent it anything.
    pub fn trusting(&self) -> usize {
        self.seen.trusting.load(Ordering::SeqCst)
    }
}
