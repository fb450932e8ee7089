//! Accepted connections: at most a fixed number at once, each cut when the drain's grace period is over, or when its
//! caller does not say, or does not take, anything for too long.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::tls::Tls;

/// Most connections a server holds; later ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 4_096;

/// Pause after a failed accept: out of file descriptors, most likely, which trying again at once does not mend.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a caller gets to say its first word: the TLS handshake, then again the first bytes of a request.
const FIRST_WORD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a caller may take nothing of what it is sent. HTTP/2 pings find such callers earlier, HTTP/1 has none.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Accepts connections until the stream is dropped; the listening sockets close with it. On those with TLS every connection
/// must begin with a handshake. Cancelling `cut` breaks every connection accepted.
pub(crate) fn accept(
    listeners: impl IntoIterator<Item = (TcpListener, Option<Tls>)>,
    cut: &CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    // One connection in flight: the server takes them as fast as they come.
    let (sender, receiver) = mpsc::channel(1);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for (listener, tls) in listeners {
        let entrance = Entrance {
            listener,
            tls,
            slots: Arc::clone(&slots),
            cut: cut.clone(),
            sender: sender.clone(),
        };
        tokio::spawn(entrance.run());
    }
    ReceiverStream::new(receiver)
}

/// A listening socket, and where its connections go.
struct Entrance {
    listener: TcpListener,
    tls: Option<Tls>,
    slots: Arc<Semaphore>,
    cut: CancellationToken,
    sender: mpsc::Sender<io::Result<Connection>>,
}

impl Entrance {
    async fn run(self) {
        while let Some((stream, arriving)) = self.next().await {
            let (stream, address) = match stream {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            match self.tls.clone() {
                None => {
                    let connection = arriving.with(Wire::Plain(stream));
                    if self.sender.send(Ok(connection)).await.is_err() {
                        return;
                    }
                }
                Some(tls) => {
                    let handshake = arriving.shake_hands(stream, address, tls);
                    let sender = self.sender.clone();
                    tokio::spawn(async move {
                        let connection = tokio::select! {
                            connection = handshake => connection,
                            () = sender.closed() => None,
                        };
                        if let Some(connection) = connection {
                            // A server that has stopped takes no more of them.
                            let _ = sender.send(Ok(connection)).await;
                        }
                    });
                }
            }
        }
    }

    /// The next connection; `None` once the server has stopped.
    async fn next(&self) -> Option<(io::Result<(TcpStream, SocketAddr)>, Arriving)> {
        let next = async {
            let slot = Arc::clone(&self.slots)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            (self.listener.accept().await, slot)
        };
        let (accepted, slot) = tokio::select! {
            next = next => next,
            () = self.sender.closed() => return None,
        };
        let stream = accepted.and_then(|(stream, address)| {
            stream.set_nodelay(true)?;
            Ok((stream, address))
        });
        let cut = self.cut.clone();
        Some((stream, Arriving { slot, cut }))
    }
}

/// What a connection holds from the start.
struct Arriving {
    slot: OwnedSemaphorePermit,
    cut: CancellationToken,
}

impl Arriving {
    /// The connection, by TLS; `None` when the caller cannot or may not speak it.
    async fn shake_hands(
        self,
        stream: TcpStream,
        address: SocketAddr,
        tls: Tls,
    ) -> Option<Connection> {
        let acceptor = TlsAcceptor::from(tls.server()?);
        let accepting = tokio::time::timeout(FIRST_WORD_TIMEOUT, acceptor.accept(stream));
        let reason = match accepting.await {
            Ok(Ok(stream)) => return Some(self.with(Wire::Tls(Box::new(stream)))),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it said nothing".to_owned(),
        };
        tracing::info!(%address, reason, "no TLS with this caller");
        None
    }

    fn with(self, wire: Wire) -> Connection {
        Connection {
            wire,
            cut: Box::pin(self.cut.cancelled_owned()),
            silent: Some(Box::pin(tokio::time::sleep(FIRST_WORD_TIMEOUT))),
            stalled: Box::pin(tokio::time::sleep(STALL_TIMEOUT)),
            stalling: false,
            _slot: self.slot,
        }
    }
}

/// Who is at the other end of a connection, in the extensions of its requests.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) tcp: TcpConnectInfo,
    /// It showed a certificate of the cluster's authority.
    pub(crate) certified: bool,
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that can be cut from outside, and is when its caller is silent or deaf.
pub(crate) struct Connection {
    wire: Wire,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Until the first bytes came: when they are given up.
    silent: Option<Pin<Box<Sleep>>>,
    /// When the caller is given up that takes nothing, while `stalling`.
    stalled: Pin<Box<Sleep>>,
    stalling: bool,
    _slot: OwnedSemaphorePermit,
}

impl Connection {
    /// Fails once the connection is cut; until then the task is woken when that happens.
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                "the server's grace period is over",
            )),
            Poll::Pending => Ok(()),
        }
    }

    /// Does one thing that sends; fails when nothing went out for too long.
    fn send<T>(
        &mut self,
        context: &mut Context<'_>,
        mut send: impl FnMut(Pin<&mut dyn Stream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        self.check(context)?;
        let sent = send(self.wire.stream(), context);
        if sent.is_ready() {
            self.stalling = false;
            return sent;
        }
        if !self.stalling {
            self.stalling = true;
            self.stalled.as_mut().reset(Instant::now() + STALL_TIMEOUT);
        }
        ready!(self.stalled.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the caller takes nothing",
        )))
    }
}

/// What both kinds of wire are.
trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

impl Wire {
    fn stream(&mut self) -> Pin<&mut dyn Stream> {
        match self {
            Self::Plain(stream) => Pin::new(stream),
            Self::Tls(stream) => Pin::new(&mut **stream),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        match &self.wire {
            Wire::Plain(stream) => Peer {
                tcp: stream.connect_info(),
                certified: false,
            },
            Wire::Tls(stream) => {
                let (stream, session) = stream.get_ref();
                Peer {
                    tcp: stream.connect_info(),
                    // It was verified in the handshake, or there would be no connection.
                    certified: session.peer_certificates().is_some(),
                }
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        let read = self.wire.stream().poll_read(context, buffer);
        if read.is_ready() {
            self.silent = None;
            return read;
        }
        if let Some(silent) = &mut self.silent {
            ready!(silent.as_mut().poll(context));
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the caller says nothing",
            )));
        }
        Poll::Pending
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.send(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.send(context, |stream, context| {
            stream.poll_write_vectored(context, slices)
        })
    }

    fn is_write_vectored(&self) -> bool {
        match &self.wire {
            Wire::Plain(stream) => stream.is_write_vectored(),
            Wire::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.send(context, |stream, context| stream.poll_flush(context))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.send(context, |stream, context| stream.poll_shutdown(context))
    }
}
