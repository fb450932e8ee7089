# Short names for the commands in CONTRIBUTING.md.

# Everything CI runs.
ci:
    bash .ci/run

# Run the bundled pair on a prompt.
generate prompt="It was a bright cold day in April":
    cargo run --release -p specattn-cli -- generate "{{prompt}}"

test:
    cargo test --workspace

lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# Rewrite the generated types after a change of the .proto files.
proto:
    cargo run -p specattn-proto --example generate

# Licences, advisories and duplicates (needs cargo-deny).
deny:
    cargo deny check

# Time forwards against the bytes they must read.
bench-engine *args:
    cargo run --release -p specattn-bench --bin engine -- {{args}}

# Check the GPU kernels against oracles and time them (needs an NVIDIA GPU).
bench-gpu *parts="check time pair forwards":
    cargo run --release -p specattn-bench --bin gpu -- {{parts}}
