//! `specattn-gateway`: parse, start the log, serve, drain.

use anyhow::Context;
use specattn_gateway::{Args, Config};
use specattn_service::args::{Service, parse};
use specattn_service::{shutdown, telemetry};

fn main() -> anyhow::Result<()> {
    let args: Args = parse(Service::Gateway);
    let _telemetry = telemetry::init(&args.telemetry, &args.traces, "specattn-gateway")?;
    let config = Config::try_from(&args)?;
    tokio::runtime::Runtime::new()
        .context("starting the runtime")?
        .block_on(async {
            let shutdown = shutdown::on_signal()?;
            let listener = args.server.bind().await?;
            specattn_gateway::serve(config, listener, shutdown).await?;
            Ok(())
        })
}
