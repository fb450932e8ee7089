//! [`Tls`]: the certificate that a process shows, and whose certificates it trusts.
//!
//! Both come from PEM files; a changed file is taken up by the connections made from then on. TLS 1.3 only, and no
//! resumption: every connection checks the other side's certificate as it is now.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::error::ServiceError;
use crate::watched::Watched;

/// Where the parts come from.
#[derive(Debug, Clone, Default)]
pub(crate) struct TlsFiles {
    /// Certificate chain and private key.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    /// Certificates of authorities; `None`: those of the system, for servers only.
    pub(crate) authorities: Option<PathBuf>,
    /// Callers must show a certificate.
    pub(crate) mutual: bool,
}

/// A process's side of TLS.
#[derive(Debug, Clone)]
pub struct Tls {
    material: Arc<Watched<Material>>,
    /// What servers' certificates must be valid for, where it is not the host of their URI.
    server_name: Option<ServerName<'static>>,
}

struct Material {
    /// Without a certificate a process serves no TLS.
    server: Option<Arc<ServerConfig>>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`ServiceError::File`] for a file that cannot be read or holds something else, [`ServiceError::Argument`] for a
    /// name that is none.
    pub(crate) fn load(files: &TlsFiles, server_name: Option<&str>) -> Result<Self, ServiceError> {
        let mut paths = Vec::new();
        if let Some((chain, key)) = &files.identity {
            paths.extend([chain.clone(), key.clone()]);
        }
        paths.extend(files.authorities.clone());
        let files = files.clone();
        let server_name = server_name
            .map(|name| ServerName::try_from(name.to_owned()))
            .transpose()
            .map_err(|error| ServiceError::Argument {
                argument: "--tls-server-name",
                reason: error.to_string(),
            })?;
        let material = Watched::load(paths, move |contents| material(&files, contents))?;
        Ok(Self {
            material: Arc::new(material),
            server_name,
        })
    }

    /// For processes that show nothing and trust whom the system trusts.
    ///
    /// # Errors
    /// None that are known: no file is read.
    pub fn of_the_system() -> Result<Self, ServiceError> {
        Self::load(&TlsFiles::default(), None)
    }

    /// How to take callers; `None` for a process without a certificate.
    pub(crate) fn server(&self) -> Option<Arc<ServerConfig>> {
        self.material.current().server.clone()
    }

    /// How to call others.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.material.current().client)
    }

    /// What the certificate of a server at `host` must be valid for.
    ///
    /// # Errors
    /// A host that is neither a name nor an address.
    pub(crate) fn name_of(&self, host: &str) -> Result<ServerName<'static>, String> {
        if let Some(name) = &self.server_name {
            return Ok(name.clone());
        }
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        ServerName::try_from(bare.to_owned()).map_err(|error| error.to_string())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes the two sides of the files' contents: certificate chain and key, where there is one; then the authorities.
fn material(files: &TlsFiles, contents: &[Vec<u8>]) -> Result<Material, String> {
    let (identity, rest) = match &files.identity {
        Some((chain, key)) => {
            let certificates = certificates(chain, &contents[0])?;
            let key = PrivateKeyDer::from_pem_slice(&contents[1])
                .map_err(|error| format!("{}: holds no private key: {error}", key.display()))?;
            (Some((certificates, key)), &contents[2..])
        }
        None => (None, contents),
    };
    let authorities = match (&files.authorities, rest) {
        (Some(path), [pem, ..]) => Some(Arc::new(store(path, pem)?)),
        _ => None,
    };
    let server = match &identity {
        Some((chain, key)) => {
            let identity = (chain.clone(), key.clone_key());
            Some(Arc::new(server(
                identity,
                authorities.clone(),
                files.mutual,
            )?))
        }
        None => None,
    };
    let trusted = authorities.unwrap_or_else(|| Arc::new(system_store()));
    Ok(Material {
        server,
        client: Arc::new(client(identity, trusted)?),
    })
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn server(
    (chain, key): Identity,
    authorities: Option<Arc<RootCertStore>>,
    mutual: bool,
) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let builder = match authorities {
        Some(authorities) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(authorities, provider());
            let verifier = if mutual {
                verifier
            } else {
                verifier.allow_unauthenticated()
            };
            let verifier = verifier.build().map_err(|error| error.to_string())?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(|error| format!("certificate and key do not go together: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client(identity: Option<Identity>, trusted: Arc<RootCertStore>) -> Result<ClientConfig, String> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(trusted);
    let mut config = match identity {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("certificate and key do not go together: {error}"))?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match parsed {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        Ok(_) => Err(format!("{}: holds no certificate", path.display())),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}

fn store(path: &Path, pem: &[u8]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        store
            .add(certificate)
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(store)
}

/// Empty where the system trusts nobody.
fn system_store() -> RootCertStore {
    let mut store = RootCertStore::empty();
    // A few of a system's certificates may be of a kind that is not understood here.
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    store
}
