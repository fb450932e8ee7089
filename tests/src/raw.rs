//! Messages as plain bytes: what a peer may send that never saw the .proto files.

use prost::bytes::{Buf, BufMut};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::StdError;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Request, Status};

use crate::{Way, soon};

/// A codec that leaves messages as they are.
#[derive(Debug, Clone, Copy, Default)]
pub struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let bytes = from.copy_to_bytes(from.remaining());
        Ok(Some(bytes.to_vec()))
    }
}

/// Answers read of one call: a session that was opened by accident may have thousands.
const ANSWERS: usize = 20;

/// Sends `messages` to `method` (`Service/Method` of the package) as a stream, and reads what comes back, to the end or
/// for a while: how many messages, and the status.
///
/// It fits unary methods too: on the wire they are streams of one message.
pub async fn call(channel: impl Way, method: &str, messages: Vec<Vec<u8>>) -> (usize, Status) {
    let path: PathAndQuery = format!("/specattn.v1.{method}").parse().unwrap();
    let mut client = tonic::client::Grpc::new(channel).max_encoding_message_size(usize::MAX);
    if let Err(error) = client.ready().await {
        let error: StdError = error.into();
        return (0, Status::unavailable(error.to_string()));
    }
    let request = Request::new(tokio_stream::iter(messages));
    let answer = soon(method, client.streaming(request, path, Bytes)).await;
    let mut stream = match answer {
        Ok(response) => response.into_inner(),
        Err(status) => return (0, status),
    };
    for count in 0..ANSWERS {
        match soon(method, stream.message()).await {
            Ok(Some(_)) => {}
            Ok(None) => return (count, Status::ok("")),
            Err(status) => return (count, status),
        }
    }
    (ANSWERS, Status::ok(""))
}
