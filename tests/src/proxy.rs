//! [`Proxy`]: a verify worker's Speculate streams, passed through and recorded.

use std::sync::{Arc, Mutex};

use specattn_proto::v1::verify_service_client::VerifyServiceClient;
use specattn_proto::v1::verify_service_server::{VerifyService, VerifyServiceServer};
use specattn_proto::v1::{
    CloseRequest, CloseResponse, InspectRequest, InspectResponse, OpenRequest, OpenResponse,
    Propose, SpeculateRequest, SpeculateResponse, Verdict, VerifyStatusRequest,
    VerifyStatusResponse, Welcome, speculate_request, speculate_response,
};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

/// What crossed, in the order of its crossing.
#[derive(Debug, Clone, PartialEq)]
pub enum Crossed {
    /// Down.
    Welcome(Welcome),
    /// Up.
    Propose(Propose),
    /// Down.
    Verdict(Verdict),
    /// Down: the session is over.
    Closed,
}

/// A running proxy; it ends with the runtime.
#[derive(Debug)]
pub struct Proxy {
    uri: String,
    crossed: Arc<Mutex<Vec<Crossed>>>,
}

impl Proxy {
    /// A proxy in front of the verify worker behind `channel`.
    pub async fn start(channel: Channel) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let crossed = Arc::new(Mutex::new(Vec::new()));
        let pass = Pass {
            channel,
            crossed: Arc::clone(&crossed),
        };
        let server = tonic::transport::Server::builder()
            .add_service(VerifyServiceServer::new(pass))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        Self {
            uri: format!("http://{address}"),
            crossed,
        }
    }

    /// Where it answers.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Everything that crossed so far.
    pub fn crossed(&self) -> Vec<Crossed> {
        self.crossed.lock().unwrap().clone()
    }
}

struct Pass {
    channel: Channel,
    crossed: Arc<Mutex<Vec<Crossed>>>,
}

#[tonic::async_trait]
impl VerifyService for Pass {
    type OpenStream = ReceiverStream<Result<OpenResponse, Status>>;
    type SpeculateStream = std::pin::Pin<
        Box<dyn tokio_stream::Stream<Item = Result<SpeculateResponse, Status>> + Send>,
    >;

    async fn open(&self, _: Request<OpenRequest>) -> Result<Response<Self::OpenStream>, Status> {
        Err(Status::unimplemented("sessions are opened directly"))
    }

    async fn speculate(
        &self,
        request: Request<Streaming<SpeculateRequest>>,
    ) -> Result<Response<Self::SpeculateStream>, Status> {
        let seen = Arc::clone(&self.crossed);
        let up = request
            .into_inner()
            .map_while(Result::ok)
            .map(move |request| {
                if let Some(speculate_request::Message::Propose(propose)) = &request.message {
                    seen.lock().unwrap().push(Crossed::Propose(propose.clone()));
                }
                request
            });
        let mut client = VerifyServiceClient::new(self.channel.clone());
        let down = client.speculate(up).await?.into_inner();
        let seen = Arc::clone(&self.crossed);
        let down = down.map(move |response| {
            let message = response.as_ref().ok().and_then(|r| r.message.clone());
            let crossed = match message {
                Some(speculate_response::Message::Welcome(welcome)) => Crossed::Welcome(welcome),
                Some(speculate_response::Message::Verdict(verdict)) => Crossed::Verdict(verdict),
                Some(speculate_response::Message::Closed(_)) => Crossed::Closed,
                None => return response,
            };
            seen.lock().unwrap().push(crossed);
            response
        });
        Ok(Response::new(Box::pin(down)))
    }

    async fn close(&self, _: Request<CloseRequest>) -> Result<Response<CloseResponse>, Status> {
        Err(Status::unimplemented("sessions are closed directly"))
    }

    async fn inspect(
        &self,
        request: Request<InspectRequest>,
    ) -> Result<Response<InspectResponse>, Status> {
        VerifyServiceClient::new(self.channel.clone())
            .inspect(request)
            .await
    }

    async fn verify_status(
        &self,
        _: Request<VerifyStatusRequest>,
    ) -> Result<Response<VerifyStatusResponse>, Status> {
        Err(Status::unimplemented("status is asked for directly"))
    }
}
