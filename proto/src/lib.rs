//! The wire: `specattn.v1` as Rust types, the limits every service keeps, and the one place where errors become
//! gRPC statuses and back.
//!
//! Generated types stay at the edge of a service: [`validate`] turns raw messages into plain checked values, and
//! [`status::Fault`] is what handlers return instead of building a [`tonic::Status`] themselves.

mod capability;
pub mod limits;
mod session_id;
pub mod status;
pub mod validate;
pub mod version;

pub use capability::Capability;
pub use session_id::SessionId;
pub use status::Fault;

/// Messages, clients and servers of package `specattn.v1`, generated from the .proto files.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all)]
pub mod v1 {
    include!("generated/specattn.v1.rs");
}

/// The package's file descriptor set, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/specattn.v1.bin");
