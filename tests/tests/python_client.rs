//! Clients that know nothing of this project's Rust code.

use specattn_tests::python::run_script;

/// grpcio, from the .proto files alone.
#[test]
fn a_client_written_from_the_proto_files_alone() {
    run_script("client_test.py", &["grpc", "grpc_tools"]);
}

/// OpenAI's own package against the HTTP API.
#[test]
fn the_openai_package() {
    run_script("openai_test.py", &["openai", "grpc", "grpc_tools"]);
}

/// A load generator that speaks OpenAI's API.
#[test]
fn the_load_tool() {
    run_script("load_tool_test.py", &["aiperf"]);
}

/// The console's page, in a real browser.
#[test]
fn the_console_in_chromium() {
    run_script("console_test.py", &["playwright.sync_api"]);
}
