//! The version of the protocol between gateway and workers, and the build that speaks it.
//!
//! Every message that begins something between two services carries the version; another one is refused with a status that
//! says so, before anything is made of the rest. A change of a message that the other side must understand raises it.
//! Clients are not asked: their API only grows.

use crate::Fault;

/// What this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Which build this is: the release, and what the builder gave as SPECATTN_BUILD, a commit for instance.
pub fn build() -> String {
    let release = env!("CARGO_PKG_VERSION");
    match option_env!("SPECATTN_BUILD") {
        Some(build) if !build.is_empty() => {
            format!("{release} ({build}, protocol {PROTOCOL_VERSION})")
        }
        _ => format!("{release} (protocol {PROTOCOL_VERSION})"),
    }
}

/// Lets only the same version pass.
///
/// # Errors
/// [`Fault::FailedPrecondition`] for another version, or none, which programs before the first said.
pub fn check(theirs: u32) -> Result<(), Fault> {
    if theirs == PROTOCOL_VERSION {
        return Ok(());
    }
    Err(Fault::FailedPrecondition(format!(
        "protocol version {theirs} meets version {PROTOCOL_VERSION}: gateway and workers must be of one release"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_versions_are_told_apart() {
        assert!(check(PROTOCOL_VERSION).is_ok());
        for other in [0, PROTOCOL_VERSION + 1, u32::MAX] {
            let refused = check(other).unwrap_err();
            assert_eq!(refused.label(), "failed_precondition");
            assert!(refused.to_string().contains(&other.to_string()));
        }
        assert!(build().contains("protocol"));
    }
}
