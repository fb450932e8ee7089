//! Plain HTTP over a raw socket.

use crate::support::{PATIENCE, Running};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Sends bytes, reads to the end of the connection: status, head, body.
pub(crate) async fn exchange(gateway: &Running, request: &[u8]) -> (u16, String, String) {
    let address = gateway.uri.strip_prefix("http://").unwrap();
    let talk = async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        // A server may answer and close before it has read everything.
        let _ = socket.write_all(request).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    };
    let answer = tokio::time::timeout(PATIENCE, talk)
        .await
        .expect("the gateway answers");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    (status, head.to_lowercase(), body.to_owned())
}

/// Asks for `path`.
pub(crate) async fn get(gateway: &Running, path: &str) -> (u16, String, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    exchange(gateway, request.as_bytes()).await
}
