//! [`Authority`]: certificates for tests, good ones and all kinds of bad ones.

use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use specattn_service::security::TlsArgs;

/// What all good certificates are valid for, besides 127.0.0.1.
pub const NAME: &str = "specattn.test";

/// An authority with a folder of its own.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

/// The files of a certificate.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new one that writes into `folder`.
    pub fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    /// The file with its own certificate.
    pub fn file(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// A certificate for [`NAME`] and 127.0.0.1.
    pub fn good(&self) -> Identity {
        self.issue("good", &[NAME, "127.0.0.1"], false)
    }

    /// The same, but expired.
    pub fn expired(&self) -> Identity {
        self.issue("expired", &[NAME, "127.0.0.1"], true)
    }

    /// A certificate for another host.
    pub fn misnamed(&self) -> Identity {
        self.issue("misnamed", &["elsewhere.test"], false)
    }

    fn issue(&self, file: &str, names: &[&str], expired: bool) -> Identity {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        if expired {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let identity = Identity {
            cert: self.folder.join(format!("{file}.pem")),
            key: self.folder.join(format!("{file}.key")),
        };
        std::fs::write(&identity.cert, cert.pem()).unwrap();
        std::fs::write(&identity.key, key.serialize_pem()).unwrap();
        identity
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// What a process shows and trusts, as its flags.
pub fn flags(identity: &Identity, authority: &Authority) -> Vec<String> {
    let text = |path: &Path| path.to_str().expect("paths of tests are UTF-8").to_owned();
    vec![
        "--tls-cert".to_owned(),
        text(&identity.cert),
        "--tls-key".to_owned(),
        text(&identity.key),
        "--tls-ca".to_owned(),
        text(&authority.file()),
    ]
}

/// The same for a caller within the test.
pub fn caller(identity: Option<&Identity>, authority: &Authority) -> TlsArgs {
    TlsArgs {
        tls_cert: identity.map(|identity| identity.cert.clone()),
        tls_key: identity.map(|identity| identity.key.clone()),
        tls_ca: Some(authority.file()),
        tls_server_name: None,
    }
}
