//! Plain HTTP/1.1 requests to a service, over a socket of their own.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::soon;

/// The body that `GET uri+path` answers with, which must be 200 and not chunked.
pub async fn get(uri: &str, path: &str) -> String {
    let address = uri.strip_prefix("http://").expect("tests speak plain HTTP");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let answer = soon(path, async {
        let mut socket = TcpStream::connect(address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    })
    .await;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .expect("an answer has a head and a body");
    assert!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    body.to_owned()
}
