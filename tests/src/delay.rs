//! [`Delay`]: a TCP connection that takes its time, in place of a network that cannot be had in a test.
//!
//! Every byte arrives a fixed time after it was sent, in both directions, in order, and at any rate: one way's delay, no
//! loss and no limit on bandwidth.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::Process;

/// Pieces under way in one direction; beyond that the sender waits, as behind a full window.
const UNDER_WAY: usize = 4_096;

/// A running proxy; it ends with the runtime.
#[derive(Debug)]
pub struct Delay {
    uri: String,
}

impl Delay {
    /// A proxy in front of `target`; each direction takes `one_way`.
    pub async fn start(target: &Process, one_way: Duration) -> Self {
        let target = target.uri().trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                // Whoever connects learns of a target that is gone by a connection that ends.
                let Ok(far) = TcpStream::connect(&target).await else {
                    continue;
                };
                // Small messages must not wait for each other.
                let _ = (near.set_nodelay(true), far.set_nodelay(true));
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                tokio::spawn(carry(near_read, far_write, one_way));
                tokio::spawn(carry(far_read, near_write, one_way));
            }
        });
        Self {
            uri: format!("http://{address}"),
        }
    }

    /// Where to connect.
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

/// Carries one direction until either end closes.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, one_way: Duration) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    tokio::spawn(async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The end travels as well; a reader that is gone needs none.
        let _ = to.shutdown().await;
    });
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = from.read(&mut buffer).await {
        let piece = (Instant::now() + one_way, buffer[..n].to_vec());
        if sender.send(piece).await.is_err() {
            return;
        }
    }
}
