//! [`Link`]: a network that cannot be had in a test, in front of one process, with weather.
//!
//! A TCP proxy: bytes arrive at once, late, or not at all for a while, and connections can be cut. Within a connection no byte
//! is lost, as TCP would not lose it; late bytes stay in order and come at any rate.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::Process;

/// Bytes read at a time.
const PIECE: usize = 64 << 10;

/// Pieces under way in one direction; beyond that the sender waits, as behind a full window.
const UNDER_WAY: usize = 4_096;

/// What happens to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// They arrive.
    Clear,
    /// They arrive so much later, in either direction.
    Late(Duration),
    /// They do not arrive while this lasts; connections stay open.
    Partition,
}

#[derive(Debug)]
struct Conditions {
    weather: watch::Sender<Weather>,
    /// Counts the cuts.
    cuts: watch::Sender<u64>,
}

/// A running proxy; it ends with the runtime.
#[derive(Debug)]
pub struct Link {
    uri: String,
    conditions: Arc<Conditions>,
}

impl Link {
    /// A link to `process`, each direction of which takes `one_way`.
    pub async fn late(process: &Process, one_way: Duration) -> Self {
        let link = Self::to(process.address().parse().expect("a process has an address")).await;
        link.set(Weather::Late(one_way));
        link
    }

    /// A link to whoever listens at `target`, now or later.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("loopback has a free port");
        let address = listener
            .local_addr()
            .expect("a bound socket has an address");
        let conditions = Arc::new(Conditions {
            weather: watch::Sender::new(Weather::Clear),
            cuts: watch::Sender::new(0),
        });
        tokio::spawn(serve(listener, target, Arc::clone(&conditions)));
        Self {
            uri: format!("http://{address}"),
            conditions,
        }
    }

    /// Where the link begins.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// Changes the weather.
    pub fn set(&self, weather: Weather) {
        self.conditions.weather.send_replace(weather);
    }

    /// Breaks every connection.
    pub fn cut(&self) {
        self.conditions.cuts.send_modify(|cuts| *cuts += 1);
    }
}

async fn serve(listener: TcpListener, target: SocketAddr, conditions: Arc<Conditions>) {
    while let Ok((near, _)) = listener.accept().await {
        let conditions = Arc::clone(&conditions);
        tokio::spawn(async move {
            let mut cuts = conditions.cuts.subscribe();
            // Whoever connects learns of a target that is gone by a connection that ends.
            let Ok(far) = TcpStream::connect(target).await else {
                return;
            };
            // Small messages must not wait for each other; where that cannot be set the link is merely slower.
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
            let there = carry(from_near, to_far, conditions.weather.subscribe());
            let back = carry(from_far, to_near, conditions.weather.subscribe());
            tokio::select! {
                _ = async { tokio::join!(there, back) } => {}
                _ = cuts.changed() => {}
            }
        });
    }
}

/// Carries one direction to its end.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, weather: watch::Receiver<Weather>) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let forecast = weather.clone();
    let reading = async move {
        let mut buffer = vec![0; PIECE];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            let delay = match *forecast.borrow() {
                Weather::Late(delay) => delay,
                Weather::Clear | Weather::Partition => Duration::ZERO,
            };
            let piece = (Instant::now() + delay, buffer[..length].to_vec());
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        let mut weather = weather;
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            let clears = weather.wait_for(|&weather| weather != Weather::Partition);
            if clears.await.is_err() || to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The end travels as well; a reader that is gone needs none.
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;

    /// A link to an echo, and a connection through it.
    async fn echo() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Link::to(listener.local_addr().unwrap()).await;
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (mut from, mut to) = stream.into_split();
            let _ = tokio::io::copy(&mut from, &mut to).await;
        });
        let stream = connect(&link).await;
        (link, stream)
    }

    async fn connect(link: &Link) -> TcpStream {
        let address = link.uri().trim_start_matches("http://").to_owned();
        TcpStream::connect(address).await.unwrap()
    }

    async fn ping(stream: &mut TcpStream) -> Duration {
        let start = Instant::now();
        stream.write_all(b"ping").await.unwrap();
        let mut pong = [0; 4];
        stream.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"ping");
        start.elapsed()
    }

    async fn does_not_end<F: Future>(future: F) {
        let moment = Duration::from_millis(100);
        assert!(tokio::time::timeout(moment, future).await.is_err());
    }

    #[tokio::test]
    async fn weather_delays_and_holds_but_loses_nothing() {
        let (link, mut stream) = echo().await;
        ping(&mut stream).await;
        link.set(Weather::Late(Duration::from_millis(50)));
        // Both ways.
        assert!(ping(&mut stream).await >= Duration::from_millis(100));
        link.set(Weather::Partition);
        stream.write_all(b"pi").await.unwrap();
        let mut pong = [0; 2];
        does_not_end(stream.read_exact(&mut pong)).await;
        link.set(Weather::Clear);
        stream.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"pi");
        ping(&mut stream).await;
    }

    #[tokio::test]
    async fn a_cut_ends_connections_and_an_absent_process_accepts_none() {
        let (link, mut stream) = echo().await;
        ping(&mut stream).await;
        link.cut();
        assert!(!matches!(stream.read(&mut [0; 4]).await, Ok(1..)));
        let nobody: SocketAddr = crate::process::free_address().parse().unwrap();
        let mut stream = connect(&Link::to(nobody).await).await;
        assert!(!matches!(stream.read(&mut [0; 4]).await, Ok(1..)));
    }
}
