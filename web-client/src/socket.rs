//! The browser's WebSocket as a [`Transport`], its timer as a [`Clock`]; both end at once when the person leaves.

use crate::tab::{monotonic, timer};
use fednano_shared::client::{Clock, Connector, Transport, TransportError};
use fednano_shared::wire::check_outgoing;
use futures_channel::mpsc;
use futures_util::task::AtomicWaker;
use futures_util::{FutureExt, StreamExt};
use std::cell::Cell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;
use wasm_bindgen::JsCast;
use wasm_bindgen::closure::Closure;
use wasm_bindgen_futures::JsFuture;
use web_sys::{BinaryType, CloseEvent, MessageEvent, WebSocket};

/// A server that takes no connection for so long counts as away.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// A server says something every 15 s; one that is silent for so long, while it is listened to, is gone.
const SILENCE: Duration = Duration::from_secs(90);
/// What browsers report when a connection broke without a goodbye.
const BROKEN: u16 = 1006;

/// A request to leave. One task waits for it at a time.
#[derive(Default)]
pub struct Leave {
    requested: Cell<bool>,
    waiting: AtomicWaker,
}

impl Leave {
    /// Leave now.
    pub fn request(&self) {
        self.requested.set(true);
        self.waiting.wake();
    }

    /// Whether to leave; if not, the task is woken when it is time.
    fn poll(&self, cx: &mut Context<'_>) -> bool {
        self.waiting.register(cx.waker());
        self.requested.get()
    }
}

/// Connects to one server.
pub struct Sockets {
    /// `ws://` or `wss://`.
    pub url: String,
    /// Ends everything.
    pub leave: Rc<Leave>,
}

enum Event {
    Open,
    Frame(Vec<u8>),
    Closed(String),
}

/// An open connection. Dropping it closes it, after what was sent.
pub struct Socket {
    socket: WebSocket,
    events: mpsc::UnboundedReceiver<Event>,
    leave: Rc<Leave>,
    heard: Duration, // when something came last, or listening began
    watch: JsFuture, // one for the whole connection: a timer that nobody waits for any more stays until its time
    // The browser calls these: they live as long as the socket.
    _on_open: Closure<dyn FnMut()>,
    _on_message: Closure<dyn FnMut(MessageEvent)>,
    _on_close: Closure<dyn FnMut(CloseEvent)>,
}

impl Socket {
    /// Begin to connect.
    fn start(url: &str, leave: Rc<Leave>) -> Result<Self, TransportError> {
        let socket =
            WebSocket::new(url).map_err(|_| TransportError::Lost(format!("'{url}' is no address of a server")))?;
        socket.set_binary_type(BinaryType::Arraybuffer);
        // Unbounded: the protocol has few requests under way, and the server's status messages are small.
        let (sender, events) = mpsc::unbounded();
        // Sending fails only once the receiver is gone, and then nobody wants the event.
        let opened = sender.clone();
        let on_open = Closure::<dyn FnMut()>::new(move || drop(opened.unbounded_send(Event::Open)));
        let received = sender.clone();
        let on_message = Closure::<dyn FnMut(MessageEvent)>::new(move |message: MessageEvent| {
            // Text is no frame; empty it fails to decode, which names the fault.
            let frame = match message.data().dyn_into::<js_sys::ArrayBuffer>() {
                Ok(buffer) => js_sys::Uint8Array::new(&buffer).to_vec(),
                Err(_) => Vec::new(),
            };
            drop(received.unbounded_send(Event::Frame(frame)));
        });
        let on_close = Closure::<dyn FnMut(CloseEvent)>::new(move |close: CloseEvent| {
            drop(sender.unbounded_send(Event::Closed(cause_of(&close))));
        });
        socket.set_onopen(Some(on_open.as_ref().unchecked_ref()));
        socket.set_onmessage(Some(on_message.as_ref().unchecked_ref()));
        socket.set_onclose(Some(on_close.as_ref().unchecked_ref()));
        Ok(Self {
            socket,
            events,
            leave,
            heard: monotonic(),
            watch: timer(SILENCE),
            _on_open: on_open,
            _on_message: on_message,
            _on_close: on_close,
        })
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, TransportError>> {
        if self.leave.poll(cx) { Poll::Ready(Err(TransportError::Left)) } else { self.poll_socket(cx) }
    }

    /// The same, also while leaving.
    fn poll_socket(&mut self, cx: &mut Context<'_>) -> Poll<Result<Event, TransportError>> {
        match self.events.poll_next_unpin(cx) {
            Poll::Ready(Some(Event::Closed(cause))) => Poll::Ready(Err(TransportError::Lost(cause))),
            Poll::Ready(Some(event)) => Poll::Ready(Ok(event)),
            Poll::Ready(None) => Poll::Ready(Err(TransportError::Lost("the connection is closed".to_owned()))),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Has nothing come for too long? If not, the task is woken when it is time to look again.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> bool {
        while self.watch.poll_unpin(cx).is_ready() {
            let left = SILENCE.saturating_sub(monotonic().saturating_sub(self.heard));
            // At least a moment: a timer may come a little early.
            self.watch = timer(left.max(Duration::from_millis(10)));
            if left.is_zero() {
                return true;
            }
        }
        false
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.socket.set_onopen(None);
        self.socket.set_onmessage(None);
        self.socket.set_onclose(None);
        drop(self.socket.close()); // closing what is closed is no fault
    }
}

fn cause_of(close: &CloseEvent) -> String {
    let (code, reason) = (close.code(), close.reason());
    if !reason.is_empty() {
        format!("the server closed the connection: {reason}")
    } else if code == BROKEN {
        "the server does not answer".to_owned()
    } else {
        format!("the server closed the connection (code {code})")
    }
}

impl Connector for Sockets {
    type Transport = Socket;

    async fn connect(&mut self) -> Result<Socket, TransportError> {
        let mut socket = Socket::start(&self.url, Rc::clone(&self.leave))?;
        let mut limit = timer(CONNECT_LIMIT);
        let first = poll_fn(|cx| match socket.poll_event(cx) {
            Poll::Pending if limit.poll_unpin(cx).is_ready() => {
                let cause = format!("the server took no connection within {} s", CONNECT_LIMIT.as_secs());
                Poll::Ready(Err(TransportError::Lost(cause)))
            }
            other => other,
        })
        .await?;
        match first {
            Event::Open => Ok(socket),
            Event::Frame(_) | Event::Closed(_) => Err(TransportError::Lost("the connection did not open".to_owned())),
        }
    }
}

impl Transport for Socket {
    /// Works while leaving, so that the goodbye goes out.
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        if self.socket.ready_state() != WebSocket::OPEN {
            return Err(TransportError::Lost("the connection is closed".to_owned()));
        }
        // The server would close the connection, which says less.
        check_outgoing(&frame).map_err(|e| TransportError::Lost(e.to_string()))?;
        self.socket
            .send_with_u8_array(&frame)
            .map_err(|_| TransportError::Lost("the browser refused to send".to_owned()))
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        self.heard = monotonic();
        loop {
            let event = poll_fn(|cx| match self.poll_event(cx) {
                Poll::Pending if self.poll_silence(cx) => {
                    let cause = format!("the server has been silent for {} s", SILENCE.as_secs());
                    Poll::Ready(Err(TransportError::Lost(cause)))
                }
                other => other,
            });
            match event.await? {
                Event::Frame(frame) => return Ok(frame),
                Event::Closed(cause) => return Err(TransportError::Lost(cause)),
                Event::Open => {}
            }
        }
    }

    async fn last(&mut self, limit: Duration) -> Result<Vec<u8>, TransportError> {
        let mut watch = timer(limit);
        loop {
            let event = poll_fn(|cx| match self.poll_socket(cx) {
                Poll::Pending if watch.poll_unpin(cx).is_ready() => {
                    Poll::Ready(Err(TransportError::Lost("the server leaves the connection open".to_owned())))
                }
                other => other,
            });
            match event.await? {
                Event::Frame(frame) => return Ok(frame),
                Event::Closed(cause) => return Err(TransportError::Lost(cause)),
                Event::Open => {}
            }
        }
    }
}

/// The browser's timers.
pub struct TabClock {
    /// Ends a wait.
    pub leave: Rc<Leave>,
}

impl Clock for TabClock {
    async fn sleep(&self, time: Duration) {
        let mut timer = timer(time);
        poll_fn(
            |cx| {
                if self.leave.poll(cx) || timer.poll_unpin(cx).is_ready() { Poll::Ready(()) } else { Poll::Pending }
            },
        )
        .await;
    }

    fn now(&self) -> Duration {
        monotonic()
    }
}
