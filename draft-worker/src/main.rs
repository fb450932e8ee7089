//! `specattn-draft`: parse, load, serve, drain.

use anyhow::Context;
use specattn_draft::{Args, Worker};
use specattn_service::args::{self, Service};
use specattn_service::{shutdown, telemetry};

fn main() -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    specattn_engine::cuda::keep_multicast_off();
    let args: Args = args::parse(Service::Draft);
    let _telemetry = telemetry::init(&args.telemetry, &args.traces, "specattn-draft")?;
    let config = args.config()?;
    let runtime = args.io.runtime()?;
    let worker = Worker::load(config, &mut |_, _| {}).context("draft worker")?;
    runtime.block_on(async {
        let shutdown = shutdown::on_signal()?;
        let listener = args.server.bind().await?;
        worker
            .serve(listener, shutdown)
            .await
            .context("draft worker")
    })
}
