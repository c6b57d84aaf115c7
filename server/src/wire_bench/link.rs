//! A line with a delay and a rate, as a TCP proxy in this process: for benchmarks and for tests. What it hands on it counts, byte for
//! byte, so it says what the operating system has carried between the two ends.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

/// What a line is like, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// From one end to the other: half a round trip.
    pub delay: Duration,
    /// Rate of each direction, shared by all connections; 0: as fast as it goes.
    pub bits_per_second: u64,
}

impl Shape {
    /// Neither delay nor limit: it only counts.
    pub const OPEN: Self = Self { delay: Duration::ZERO, bits_per_second: 0 };

    /// By round trip and Mbit/s (10^6 bits) of each direction.
    pub fn round_trip(round_trip: Duration, megabits_per_second: u64) -> Self {
        Self { delay: round_trip / 2, bits_per_second: megabits_per_second.saturating_mul(1_000_000) }
    }

    /// How long the line is busy with so many bytes.
    fn busy(&self, bytes: usize) -> Duration {
        match self.bits_per_second {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64),
        }
    }
}

/// Read at once at most. Small beside what any line of interest carries in a delay, so that rates are smooth.
const CHUNK: usize = 16 << 10;
/// Pieces on their way, at most: 16 MiB, what a line of 1 Gbit/s has under way in 130 ms.
const UNDER_WAY: usize = 1024;
/// The reader may be so much ahead of the line: timers are no finer, and waking late must not cost rate.
const AHEAD: Duration = Duration::from_millis(4);

/// A line to an address; it ends, with all its connections, when this is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    line: Arc<Line>,
    accepting: JoinHandle<()>,
}

/// What all connections share.
#[derive(Debug)]
struct Line {
    shape: Shape,
    up: Direction,
    down: Direction,
}

#[derive(Debug)]
struct Direction {
    /// When it is done with everything that was put on it.
    free: Mutex<Instant>,
    /// Bytes handed on.
    bytes: AtomicU64,
}

impl Direction {
    fn new() -> Self {
        Self { free: Mutex::new(Instant::now()), bytes: AtomicU64::new(0) }
    }

    /// Put bytes on the line; when their last bit is on it.
    fn put(&self, busy: Duration) -> Instant {
        // No panic can leave an instant half changed.
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = Instant::now().max(*free) + busy;
        *free
    }
}

/// Listen on a free port of this machine and hand everything on to `to` and back, over a line of this shape.
///
/// # Errors
/// The system gives no port.
pub async fn proxy(to: SocketAddr, shape: Shape) -> std::io::Result<Proxy> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    let line = Arc::new(Line { shape, up: Direction::new(), down: Direction::new() });
    let accepting = tokio::spawn(accept(listener, to, line.clone()));
    Ok(Proxy { address, line, accepting })
}

impl Proxy {
    /// Connect here instead.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes handed on so far: from whoever connected here, and to them.
    pub fn bytes(&self) -> (u64, u64) {
        let of = |direction: &Direction| direction.bytes.load(Ordering::SeqCst);
        (of(&self.line.up), of(&self.line.down))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort(); // the connections are tasks of its own and end with it
    }
}

async fn accept(listener: TcpListener, to: SocketAddr, line: Arc<Line>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((near, _)) => drop(connections.spawn(connection(near, to, line.clone()))),
                // Out of descriptors, perhaps: connections that end free some.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection to its end in both directions. Where the other side cannot be reached it is closed, as a router would do it.
async fn connection(near: TcpStream, to: SocketAddr, line: Arc<Line>) {
    let Ok(far) = TcpStream::connect(to).await else { return };
    // The line's own delay is the only one that is wanted. Where a socket has no such option, nothing breaks.
    drop(near.set_nodelay(true));
    drop(far.set_nodelay(true));
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::join!(carry(near_in, far_out, &line, &line.up), carry(far_in, near_out, &line, &line.down));
}

/// Everything that one side says, to the other; then the end, if it says that.
async fn carry(from: OwnedReadHalf, to: OwnedWriteHalf, line: &Line, direction: &Direction) {
    let (sender, receiver) = mpsc::channel(UNDER_WAY);
    tokio::join!(put(from, sender, line.shape, direction), deliver(receiver, to, direction));
}

/// Read no faster than the line takes it, so that whoever sends too much at once waits, as on a real line.
async fn put(mut from: OwnedReadHalf, sender: mpsc::Sender<(Instant, Vec<u8>)>, shape: Shape, direction: &Direction) {
    let mut chunk = vec![0; CHUNK];
    // A broken connection ends as a closed one does: what has come is still delivered.
    while let Ok(read) = from.read(&mut chunk).await {
        let Some(bytes) = chunk.get(..read).filter(|bytes| !bytes.is_empty()) else { return };
        let gone = direction.put(shape.busy(read));
        if sender.send((gone + shape.delay, bytes.to_vec())).await.is_err() {
            return; // nobody takes any more
        }
        if let Some(room) = gone.checked_sub(AHEAD) {
            sleep_until(room).await;
        }
    }
}

async fn deliver(mut receiver: mpsc::Receiver<(Instant, Vec<u8>)>, mut to: OwnedWriteHalf, direction: &Direction) {
    while let Some((due, bytes)) = receiver.recv().await {
        sleep_until(due).await;
        if to.write_all(&bytes).await.is_err() {
            return;
        }
        direction.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
    }
    drop(to.shutdown().await); // the other side may be gone already
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends everything back until its peer ends.
    async fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = socket.into_split();
                    drop(tokio::io::copy(&mut from, &mut to).await);
                });
            }
        });
        address
    }

    /// Send, end, and read what comes back until the end.
    async fn talk(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
        let (mut from, mut to) = TcpStream::connect(address).await.unwrap().into_split();
        let mut back = Vec::new();
        let (sent, read) = tokio::join!(
            async {
                to.write_all(bytes).await?;
                to.shutdown().await
            },
            from.read_to_end(&mut back)
        );
        sent.unwrap();
        read.unwrap();
        back
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 251) as u8).collect()
    }

    #[tokio::test]
    async fn every_byte_comes_through_and_is_counted() {
        let proxy = proxy(echo().await, Shape::OPEN).await.unwrap();
        let large = bytes(300_001);
        let (first, second) = tokio::join!(talk(proxy.address(), &large), talk(proxy.address(), b"few"));
        assert!(first == large && second == b"few");
        assert_eq!(proxy.bytes(), (300_004, 300_004));
    }

    #[tokio::test]
    async fn a_line_takes_its_time() {
        // 50,000 bytes at 4 Mbit/s are 100 ms on the line each way, the echo begins while the rest is still on its way; 40 ms round trip.
        let proxy = proxy(echo().await, Shape::round_trip(Duration::from_millis(40), 4)).await.unwrap();
        let begun = Instant::now();
        assert_eq!(talk(proxy.address(), &bytes(50_000)).await.len(), 50_000);
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(135), "{took:?}"); // a busy machine may take any longer
        assert_eq!(proxy.bytes(), (50_000, 50_000));
    }

    #[tokio::test]
    async fn who_is_not_there_is_not_reached_and_a_dropped_line_is_gone() {
        let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap(); // closed again
        let proxy = proxy(nobody, Shape::OPEN).await.unwrap();
        let mut socket = TcpStream::connect(proxy.address()).await.unwrap();
        // Closed or reset, at once either way.
        assert_eq!(socket.read(&mut [0; 8]).await.unwrap_or(0), 0);
        assert_eq!(proxy.bytes(), (0, 0));
        let address = proxy.address();
        drop(proxy);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[test]
    fn a_rate_is_in_bits() {
        let shape = Shape::round_trip(Duration::from_millis(10), 8);
        assert_eq!((shape.delay, shape.busy(1000)), (Duration::from_millis(5), Duration::from_millis(1)));
        assert_eq!(Shape::OPEN.busy(usize::MAX), Duration::ZERO);
    }
}
