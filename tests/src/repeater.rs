//! [`Repeater`]: a verify worker's service, passed through by a proxy that may say things twice.
//!
//! What is repeated is what the protocol lets be repeated: proposals, which carry sequence numbers, and committed tokens,
//! which carry their place. All else passes once, as does everything while nothing is to be repeated.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::verify_service_server::{VerifyService, VerifyServiceServer};
use specattn_proto::v1::{
    CloseRequest, CloseResponse, InspectRequest, InspectResponse, OpenRequest, OpenResponse,
    SpeculateRequest, SpeculateResponse, VerifyStatusRequest, VerifyStatusResponse, open_response,
    speculate_request,
};
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

/// A running proxy; it ends with the runtime.
#[derive(Debug)]
pub struct Repeater {
    address: SocketAddr,
    twice: Arc<AtomicBool>,
}

impl Repeater {
    /// A proxy in front of the verify worker at `uri`, now or later, that says everything once.
    pub async fn to(uri: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let endpoint = specattn_service::channel::endpoint(uri).expect("a process has a URI");
        let twice = Arc::new(AtomicBool::new(false));
        let pass = Pass {
            client: VerifyServiceClient::new(endpoint.connect_lazy()),
            twice: Arc::clone(&twice),
        };
        let server = tonic::transport::Server::builder()
            .add_service(VerifyServiceServer::new(pass))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        Self { address, twice }
    }

    /// Where it answers.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether things are said twice from now on.
    pub fn say_twice(&self, twice: bool) {
        self.twice.store(twice, Ordering::Relaxed);
    }
}

struct Pass {
    client: VerifyServiceClient<tonic::transport::Channel>,
    twice: Arc<AtomicBool>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The same items, those that `repeats` picks twice while `twice` is set.
fn repeat<T: Clone + Send + 'static>(
    items: impl Stream<Item = T> + Send + 'static,
    twice: &Arc<AtomicBool>,
    repeats: fn(&T) -> bool,
) -> impl Stream<Item = T> + Send + 'static {
    let twice = Arc::clone(twice);
    items.flat_map(move |item| {
        let again = twice.load(Ordering::Relaxed) && repeats(&item);
        tokio_stream::iter(std::iter::repeat_n(item, 1 + usize::from(again)))
    })
}

fn is_proposal(request: &SpeculateRequest) -> bool {
    matches!(
        request.message,
        Some(speculate_request::Message::Propose(_))
    )
}

fn is_commit(response: &Result<OpenResponse, Status>) -> bool {
    response
        .as_ref()
        .is_ok_and(|response| matches!(response.event, Some(open_response::Event::Committed(_))))
}

#[tonic::async_trait]
impl VerifyService for Pass {
    type OpenStream = Answers<OpenResponse>;
    type SpeculateStream = Streaming<SpeculateResponse>;

    async fn open(
        &self,
        request: Request<OpenRequest>,
    ) -> Result<Response<Self::OpenStream>, Status> {
        let events = self.client.clone().open(request.into_inner()).await?;
        let events = repeat(events.into_inner(), &self.twice, is_commit);
        Ok(Response::new(Box::pin(events)))
    }

    async fn speculate(
        &self,
        request: Request<Streaming<SpeculateRequest>>,
    ) -> Result<Response<Self::SpeculateStream>, Status> {
        let up = tokio_stream::StreamExt::map_while(request.into_inner(), Result::ok);
        let up = repeat(up, &self.twice, is_proposal);
        let down = self.client.clone().speculate(up).await?;
        Ok(Response::new(down.into_inner()))
    }

    async fn close(
        &self,
        request: Request<CloseRequest>,
    ) -> Result<Response<CloseResponse>, Status> {
        self.client.clone().close(request.into_inner()).await
    }

    async fn inspect(
        &self,
        request: Request<InspectRequest>,
    ) -> Result<Response<InspectResponse>, Status> {
        self.client.clone().inspect(request.into_inner()).await
    }

    async fn verify_status(
        &self,
        request: Request<VerifyStatusRequest>,
    ) -> Result<Response<VerifyStatusResponse>, Status> {
        self.client
            .clone()
            .verify_status(request.into_inner())
            .await
    }
}
