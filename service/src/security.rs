//! [`SecurityArgs`]: what a service shows, whom it trusts, and who may call it; the same flags for every service.
//!
//! The rule: on a loopback address whoever calls is trusted, unless credentials are configured. On any other address
//! nobody is, unless they show what is configured, or a person said in words that anyone may call.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::channel::Dialer;
use crate::error::ServiceError;
use crate::guard::Peers;
use crate::secret::Secrets;
use crate::tls::{Tls, TlsFiles};

/// Certificates: what is shown, and what is trusted.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Security")]
pub struct TlsArgs {
    /// PEM file with the certificate chain to show to servers and callers
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        env = "SPECATTN_TLS_CERT"
    )]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with its private key
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "SPECATTN_TLS_KEY"
    )]
    pub tls_key: Option<PathBuf>,

    /// PEM file with the authorities whose certificates are trusted [default: the system's, for servers only]
    #[arg(long, value_name = "FILE", env = "SPECATTN_TLS_CA")]
    pub tls_ca: Option<PathBuf>,

    /// Name that the certificates of servers must be valid for [default: the host of their URI]
    #[arg(long, value_name = "NAME", env = "SPECATTN_TLS_SERVER_NAME")]
    pub tls_server_name: Option<String>,
}

impl TlsArgs {
    /// Reads the files; `None` where none is named.
    ///
    /// # Errors
    /// [`ServiceError::File`] for one that cannot be read or holds something else.
    pub fn load(&self) -> Result<Option<Tls>, ServiceError> {
        self.load_with(false)
    }

    fn load_with(&self, mutual: bool) -> Result<Option<Tls>, ServiceError> {
        let files = TlsFiles {
            identity: self.tls_cert.clone().zip(self.tls_key.clone()),
            authorities: self.tls_ca.clone(),
            mutual,
        };
        if files.identity.is_none() && files.authorities.is_none() && self.tls_server_name.is_none()
        {
            return Ok(None);
        }
        Tls::load(&files, self.tls_server_name.as_deref()).map(Some)
    }
}

/// What a service shows, whom it trusts, and who may call it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Security")]
pub struct SecurityArgs {
    /// With a certificate the service speaks TLS only.
    #[command(flatten)]
    pub tls: TlsArgs,

    /// Refuse connections without a certificate of --tls-ca, also where a key or secret would do
    #[arg(long, requires_all = ["tls_ca", "tls_cert"], env = "SPECATTN_MUTUAL_TLS")]
    pub mutual_tls: bool,

    /// File with the secret by which gateway and workers know each other, of 32 characters or more; of several lines the
    /// first is shown and all are accepted [default: the certificates of --tls-ca are what they know each other by]
    #[arg(long, value_name = "FILE", env = "SPECATTN_WORKER_SECRET_FILE")]
    pub worker_secret_file: Option<PathBuf>,

    /// Serve /metrics to callers without credentials too
    #[arg(long, env = "SPECATTN_PUBLIC_METRICS")]
    pub public_metrics: bool,

    /// Take calls from anyone who can reach an address that is not loopback, where no credentials are configured
    #[arg(long, env = "SPECATTN_INSECURE_ALLOW_ANYONE")]
    pub insecure_allow_anyone: bool,
}

/// [`SecurityArgs`], with the files read.
#[derive(Debug, Clone, Default)]
pub struct Security {
    /// This process's side of TLS.
    pub tls: Option<Tls>,
    /// What gateway and workers know each other by.
    pub secret: Option<Secrets>,
    /// Whether `/metrics` is for everyone.
    pub public_metrics: bool,
    /// Callers may be known by their certificates.
    certifies: bool,
    /// Everybody who connects has a certificate.
    mutual: bool,
    anyone: bool,
}

impl SecurityArgs {
    /// Reads the files.
    ///
    /// # Errors
    /// [`ServiceError::File`] for one that cannot be read or holds something else.
    pub fn load(&self) -> Result<Security, ServiceError> {
        let secret = self.worker_secret_file.as_deref().map(Secrets::load);
        Ok(Security {
            tls: self.tls.load_with(self.mutual_tls)?,
            secret: secret.transpose()?,
            public_metrics: self.public_metrics,
            certifies: self.tls.tls_ca.is_some() && self.tls.tls_cert.is_some(),
            mutual: self.mutual_tls,
            anyone: self.insecure_allow_anyone,
        })
    }
}

impl Security {
    /// Whether callers without credentials are trusted at `address`, where none are configured.
    pub fn trusts_callers_at(&self, address: SocketAddr) -> bool {
        self.anyone || address.ip().to_canonical().is_loopback()
    }

    /// Whether callers may be known by their certificates alone.
    pub fn certifies(&self) -> bool {
        self.certifies
    }

    /// Whether everybody who connects has a certificate of the authority.
    pub fn is_mutual(&self) -> bool {
        self.mutual
    }

    /// How a service at `address` recognises other parts of the cluster, by these secrets where there are some.
    pub fn peers(&self, address: SocketAddr, secrets: Vec<Secrets>) -> Peers {
        if !secrets.is_empty() {
            Peers::Secrets(secrets)
        } else if self.certifies {
            Peers::Certified
        } else if self.trusts_callers_at(address) {
            Peers::Anyone
        } else {
            Peers::Nobody
        }
    }

    /// How a worker at `address` recognises gateways.
    ///
    /// # Errors
    /// [`ServiceError::Argument`] where anybody could call it.
    pub fn worker_peers(&self, address: SocketAddr) -> Result<Peers, ServiceError> {
        match self.peers(address, self.secret.iter().cloned().collect()) {
            Peers::Nobody => Err(exposed(
                address,
                "--worker-secret-file, or --tls-ca with --tls-cert and --tls-key",
            )),
            peers => Ok(peers),
        }
    }

    /// Whether connections are taken by TLS only.
    pub fn serves_tls(&self) -> bool {
        self.serving_tls().is_some()
    }

    pub(crate) fn serving_tls(&self) -> Option<Tls> {
        self.tls.clone().filter(|tls| tls.server().is_some())
    }

    /// How this process calls other parts of the cluster.
    pub fn dialer(&self) -> Dialer {
        Dialer::new(self.tls.clone(), self.secret.clone())
    }
}

/// The refusal to start where anybody could call.
pub fn exposed(address: SocketAddr, credentials: &str) -> ServiceError {
    ServiceError::Argument {
        argument: "--listen",
        reason: format!(
            "{address} can be reached from elsewhere, and callers need no credentials: give {credentials}; or listen on \
             127.0.0.1; or say --insecure-allow-anyone"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn loopback_is_open_and_other_addresses_want_credentials() {
        let open = Security::default();
        for loopback in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            let peers = open.worker_peers(address(loopback));
            assert!(matches!(peers, Ok(Peers::Anyone)), "{loopback}");
        }
        for elsewhere in ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "[fe80::1]:1"] {
            let refused = open.worker_peers(address(elsewhere)).unwrap_err();
            assert!(
                refused.to_string().contains("--insecure-allow-anyone"),
                "{refused}"
            );
        }
        let told = Security {
            anyone: true,
            ..Security::default()
        };
        assert!(matches!(
            told.worker_peers(address("0.0.0.0:1")),
            Ok(Peers::Anyone)
        ));
        let secret = Security {
            secret: Some(Secrets::of(&"x".repeat(32)).unwrap()),
            ..told
        };
        // Credentials that are configured are wanted everywhere, whatever else is said.
        for everywhere in ["0.0.0.0:1", "127.0.0.1:1"] {
            let peers = secret.worker_peers(address(everywhere));
            assert!(matches!(peers, Ok(Peers::Secrets(_))));
        }
    }
}
