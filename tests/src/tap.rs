//! Connections whose frames are kept, and that break where a test wants it.

use fednano_shared::client::{Connector, Transport, TransportError};
use fednano_shared::wire::{self, ClientMessage, ServerMessage};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

/// All frames of a participant, in order, over all its connections.
#[derive(Clone, Default)]
pub struct Frames(Rc<RefCell<Kept>>);

#[derive(Default)]
struct Kept {
    frames: Vec<(Way, Vec<u8>)>,
    connections: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Up,
    Down,
}

/// A message, by who said it.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // few
pub enum Said {
    /// The client.
    Up(ClientMessage),
    /// The server.
    Down(ServerMessage),
}

impl Frames {
    /// What was said, in the order in which the client sent and received it.
    pub fn said(&self) -> Vec<Said> {
        let read = |(way, frame): &(Way, Vec<u8>)| match way {
            Way::Up => Said::Up(wire::decode(frame).expect("the client's own frame")),
            Way::Down => Said::Down(wire::decode(frame).expect("the server's frame")),
        };
        self.0.borrow().frames.iter().map(read).collect()
    }

    /// What the client said.
    pub fn up(&self) -> Vec<ClientMessage> {
        self.raw_up().iter().map(|frame| wire::decode(frame).expect("the client's own frame")).collect()
    }

    /// What the server said.
    pub fn down(&self) -> Vec<ServerMessage> {
        self.raw_down().iter().map(|frame| wire::decode(frame).expect("the server's frame")).collect()
    }

    /// The client's frames as they were sent.
    pub fn raw_up(&self) -> Vec<Vec<u8>> {
        self.raw(Way::Up)
    }

    /// The server's frames as they came.
    pub fn raw_down(&self) -> Vec<Vec<u8>> {
        self.raw(Way::Down)
    }

    fn raw(&self, way: Way) -> Vec<Vec<u8>> {
        self.0.borrow().frames.iter().filter(|(w, _)| *w == way).map(|(_, frame)| frame.clone()).collect()
    }

    fn keep(&self, way: Way, frame: Vec<u8>) {
        self.0.borrow_mut().frames.push((way, frame));
    }

    /// Connections that were made.
    pub fn connections(&self) -> usize {
        self.0.borrow().connections
    }
}

/// Makes connections that are listened to.
pub struct Tap<C> {
    inner: C,
    /// What was said.
    pub frames: Frames,
    /// After so many frames, in both directions, the first connection breaks; after so many the second; and so on.
    pub breaks: VecDeque<usize>,
}

impl<C> Tap<C> {
    /// Connections that last.
    pub fn new(inner: C) -> Self {
        Self { inner, frames: Frames::default(), breaks: VecDeque::new() }
    }
}

impl<C: Connector> Connector for Tap<C> {
    type Transport = Tapped<C::Transport>;

    async fn connect(&mut self) -> Result<Self::Transport, TransportError> {
        let inner = self.inner.connect().await?;
        self.frames.0.borrow_mut().connections += 1;
        Ok(Tapped { inner, frames: self.frames.clone(), left: self.breaks.pop_front() })
    }
}

/// A connection that is listened to.
pub struct Tapped<T> {
    inner: T,
    frames: Frames,
    left: Option<usize>,
}

impl<T> Tapped<T> {
    fn go_on(&mut self) -> Result<(), TransportError> {
        match &mut self.left {
            Some(0) => Err(TransportError::Lost("broken by the test".into())),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl<T: Transport> Transport for Tapped<T> {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        self.go_on()?;
        self.inner.send(frame.clone()).await?;
        self.frames.keep(Way::Up, frame);
        Ok(())
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        self.go_on()?;
        let frame = self.inner.receive().await?;
        self.frames.keep(Way::Down, frame.clone());
        Ok(frame)
    }

    async fn last(&mut self, limit: Duration) -> Result<Vec<u8>, TransportError> {
        self.go_on()?;
        let frame = self.inner.last(limit).await?;
        self.frames.keep(Way::Down, frame.clone());
        Ok(frame)
    }
}
