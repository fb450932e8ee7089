//! `specattn health`: whether a service takes requests, for probes that cannot speak TLS themselves.

use specattn_proto::Fault;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::args::HealthArgs;
use crate::connect::Gateway;
use crate::error::CliError;

/// Runs the command.
///
/// # Errors
/// [`CliError::Service`] when the service does not answer, or drains.
pub async fn run(args: &HealthArgs) -> Result<(), CliError> {
    let service = Gateway::new(&args.url, &args.connect)?;
    let mut client = HealthClient::new(service.connect().await?);
    let answer = client.check(HealthCheckRequest::default()).await?;
    match answer.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => {
            Err(Fault::Unavailable(format!("the service says {}", status.as_str_name())).into())
        }
    }
}
