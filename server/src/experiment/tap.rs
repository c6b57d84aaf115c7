//! A connection that remembers the updates which pass through it, so that one run's updates can be merged in several ways.

use crate::native::{ChannelConnector, ClientEnd};
use fednano_shared::client::{Connector, Transport, TransportError};
use fednano_shared::plain::AdapterState;
use fednano_shared::wire::{self, ClientMessage, ServerMessage, Update};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// What has passed.
#[derive(Default)]
pub(super) struct Heard {
    /// The adapters that each round began with.
    pub(super) rounds: BTreeMap<u32, AdapterState>,
    /// Updates by round and the client's number.
    pub(super) updates: BTreeMap<(u32, usize), Update>,
}

/// Makes connections of one client.
pub(super) struct Tapped {
    pub(super) inner: ChannelConnector,
    pub(super) number: usize,
    /// None: nothing is remembered.
    pub(super) heard: Option<Rc<RefCell<Heard>>>,
}

/// One of its connections.
pub(super) struct TappedEnd {
    inner: ClientEnd,
    number: usize,
    heard: Option<Rc<RefCell<Heard>>>,
}

impl Connector for Tapped {
    type Transport = TappedEnd;

    async fn connect(&mut self) -> Result<TappedEnd, TransportError> {
        Ok(TappedEnd { inner: self.inner.connect().await?, number: self.number, heard: self.heard.clone() })
    }
}

impl Transport for TappedEnd {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        if let Some(heard) = &self.heard
            && let Ok(ClientMessage::Update(update)) = wire::decode(&frame)
        {
            heard.borrow_mut().updates.insert((update.round, self.number), update);
        }
        self.inner.send(frame).await
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        let frame = self.inner.receive().await?;
        if let Some(heard) = &self.heard
            && let Ok(ServerMessage::Round { round, adapter }) = wire::decode(&frame)
        {
            heard.borrow_mut().rounds.insert(round, adapter);
        }
        Ok(frame)
    }
}
