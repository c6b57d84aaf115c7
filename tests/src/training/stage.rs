//! A server that the test plays, and a participant of it.

use super::Bench;
use fednano_shared::boundary::{BoundaryReply, BoundaryRequest, Pair, Place};
use fednano_shared::client::keep::token_of;
use fednano_shared::client::{
    ClientEvent, Clock, Connector, Keeper, Observer, Outcome, Participant, Transport, TransportError, participate,
};
use fednano_shared::edge::Batch;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::settings::{BoundaryChoice, FederationSettings};
use fednano_shared::step::{InProcess, LlmBoundary};
use fednano_shared::wire::agreement::{Agreement, BoundaryMode};
use fednano_shared::wire::convert::{Shapes, Sources};
use fednano_shared::wire::numbers::{Packed, PictureKey};
use fednano_shared::wire::{
    self, ClientMessage, Hello, LocalEvaluation, ParticipantId, Phase, ServerMessage, SessionToken, Status, Update,
    WireReply, WireRequest,
};
pub(super) use fednano_tests::Notes;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// A server that the test plays: it answers at once, and sends the same adapters in every round. It speaks the mode that its settings
/// name, else `activations`.
pub(super) struct Stage<'a> {
    bench: &'a Bench,
    settings: FederationSettings,
    agreement: Agreement,
    boundary: Cell<Option<InProcess<'a>>>,
    /// Any batch: the boundary in this process needs none.
    any: Batch,
    waiting: RefCell<VecDeque<Waiting>>,
    pictures: RefCell<BTreeMap<PictureKey, Arc<Packed>>>,
    up: RefCell<Option<Arc<Pair<TensorBlob>>>>,
    pub(super) adapter: AdapterState,
    round: Cell<u32>,
    /// The person leaves when so many training requests are answered.
    pub(super) leave_after: Cell<Option<usize>>,
    /// The federation goes on to the next round before it answers this training request.
    pub(super) hurry_at: Cell<Option<usize>>,
    /// It knows nobody who comes.
    pub(super) strange: Cell<bool>,
    pub(super) trained: RefCell<Vec<(u32, BoundaryRequest)>>,
    pub(super) evaluated: RefCell<Vec<BoundaryRequest>>,
    pub(super) updates: RefCell<Vec<Update>>,
    pub(super) personal: Cell<Option<LocalEvaluation>>,
}

impl<'a> Stage<'a> {
    pub(super) fn new(bench: &'a Bench, settings: &FederationSettings) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let dim = bench.halves.edge.config.text.hidden;
        let mode = match settings.boundary {
            BoundaryChoice::LowRank => BoundaryMode::LowRank,
            BoundaryChoice::Activations | BoundaryChoice::Auto => BoundaryMode::Activations,
        };
        Self {
            bench,
            settings: settings.clone(),
            agreement: Agreement { mode, overlap: settings.overlap, ..Agreement::PLAIN },
            boundary: Cell::new(Some(InProcess::new(&bench.halves.llm, mode))),
            any: bench.batch(&[0]),
            waiting: RefCell::default(),
            pictures: RefCell::default(),
            up: RefCell::default(),
            adapter: NanoAdapters::initial(settings.adapters, settings.rank, dim, &mut rng),
            round: Cell::new(1),
            leave_after: Cell::new(None),
            hurry_at: Cell::new(None),
            strange: Cell::new(false),
            trained: RefCell::default(),
            evaluated: RefCell::default(),
            updates: RefCell::default(),
            personal: Cell::new(None),
        }
    }

    /// What to do in the current round.
    fn order(&self) -> ServerMessage {
        let (round, adapter) = (self.round.get(), self.adapter.clone());
        if round > self.settings.rounds {
            ServerMessage::Finished { adapter }
        } else {
            ServerMessage::Round { round, adapter }
        }
    }

    fn next_round(&self) -> ServerMessage {
        self.round.set(self.round.get() + 1);
        self.order()
    }

    fn welcome(&self, hello: &Hello) -> ServerMessage {
        let status = Status {
            federation: "test".into(),
            phase: Phase::Training,
            round: self.round.get(),
            rounds: self.settings.rounds,
            participants: Vec::new(),
            history: Vec::new(),
            min_participants: 1,
        };
        let token = SessionToken("secret".into());
        let returning = !self.strange.get() && hello.resume.as_ref() == Some(&token);
        ServerMessage::Welcome {
            participant: ParticipantId(1),
            token,
            returning,
            settings: self.settings.clone(),
            agreement: self.agreement,
            status,
        }
    }

    /// A request as the LLM takes it.
    fn read(&self, request: WireRequest) -> anyhow::Result<BoundaryRequest> {
        let edge = &self.bench.halves.edge;
        let shapes = Shapes { dim: edge.config.text.hidden, image_positions: edge.config.image_tokens() };
        if let Some(up) = request.matrices(&self.agreement, shapes).map_err(anyhow::Error::msg)? {
            *self.up.borrow_mut() = Some(Arc::new(up));
        }
        let token = |id: u32, out: &mut [f32]| {
            if id as usize >= edge.vocabulary() {
                return Err(format!("token {id}"));
            }
            out.copy_from_slice(&edge.assemble_token(id).x.data);
            Ok(())
        };
        let pictures = self.pictures.borrow();
        let sources = Sources { up: self.up.borrow().clone(), pictures: &pictures, token: &token };
        request.unpack(&self.agreement, shapes, &sources).map_err(anyhow::Error::msg)
    }

    async fn train(&self, request: BoundaryRequest, place: Place) -> anyhow::Result<BoundaryReply> {
        let mut boundary = self.boundary.take().expect("one request at a time");
        let sent = boundary.send(request, &self.any, place).await;
        let reply = boundary.reply().await;
        self.boundary.set(Some(boundary));
        sent?;
        Ok(reply?)
    }

    /// What it says to a message, and whether the person leaves then.
    async fn answers(&self, message: ClientMessage) -> anyhow::Result<(Vec<ServerMessage>, bool)> {
        let said = match message {
            ClientMessage::Hello(hello) => {
                self.waiting.borrow_mut().clear();
                vec![self.welcome(&hello), self.order()]
            }
            ClientMessage::Train { id, round, request } => {
                self.waiting.borrow_mut().push_back(Waiting { id, round: Some(round), request, asked: false });
                return self.work().await;
            }
            ClientMessage::Evaluate { id, request, .. } => {
                self.waiting.borrow_mut().push_back(Waiting { id, round: None, request, asked: false });
                return self.work().await;
            }
            ClientMessage::Features { pictures, .. } => {
                let pictures = pictures.into_iter().map(|(key, features)| (key, Arc::new(features)));
                self.pictures.borrow_mut().extend(pictures);
                return self.work().await;
            }
            ClientMessage::Update(update) => {
                let round = update.round;
                self.updates.borrow_mut().push(update);
                let accepted = ServerMessage::UpdateAccepted { round };
                if round == self.round.get() { vec![accepted, self.next_round()] } else { vec![accepted] }
            }
            ClientMessage::Personal { local, .. } => {
                self.personal.set(Some(local));
                Vec::new()
            }
            _ => Vec::new(),
        };
        Ok((said, false))
    }

    /// Answer requests in their order, up to one that lacks features, for which it asks.
    async fn work(&self) -> anyhow::Result<(Vec<ServerMessage>, bool)> {
        let mut said = Vec::new();
        loop {
            let missing = self.missing();
            let Some(Waiting { id, round, request, .. }) = self.next_complete(missing, &mut said) else {
                return Ok((said, false));
            };
            let Some(round) = round else {
                let request = self.read(request)?;
                self.evaluated.borrow_mut().push(request.clone());
                let mut boundary = InProcess::new(&self.bench.halves.llm, self.agreement.mode);
                said.push(ServerMessage::Evaluated { id, reply: boundary.evaluate(request, &self.any).await? });
                continue;
            };
            let number = self.trained.borrow().len();
            if self.leave_after.get().is_some_and(|limit| number >= limit) {
                return Ok((said, true));
            }
            let (place, request) = (request.place, self.read(request)?);
            self.trained.borrow_mut().push((round, request.clone()));
            let reply = WireReply::pack(&self.train(request, place).await?, &self.agreement, id)?;
            if self.hurry_at.get() == Some(number) {
                said.push(self.next_round());
            }
            said.push(ServerMessage::Trained { id, reply });
        }
    }

    /// Pictures that the oldest request needs and that are not here.
    fn missing(&self) -> Vec<PictureKey> {
        let (waiting, here) = (self.waiting.borrow(), self.pictures.borrow());
        let needed = waiting.front().map(|oldest| oldest.request.pictures()).unwrap_or_default();
        needed.into_iter().filter(|key| !here.contains_key(key)).collect()
    }

    /// The oldest request, if nothing is missing; else that is said, once.
    fn next_complete(&self, missing: Vec<PictureKey>, said: &mut Vec<ServerMessage>) -> Option<Waiting> {
        let mut waiting = self.waiting.borrow_mut();
        if missing.is_empty() {
            return waiting.pop_front();
        }
        if let Some(oldest) = waiting.front_mut().filter(|oldest| !oldest.asked) {
            oldest.asked = true;
            said.push(ServerMessage::Missing { id: oldest.id, pictures: missing });
        }
        None
    }
}

/// A request that is not answered yet.
struct Waiting {
    id: u64,
    /// Of a training request.
    round: Option<u32>,
    request: WireRequest,
    /// For what it lacks.
    asked: bool,
}

/// A connection to it.
pub(super) struct Line<'s> {
    stage: &'s Stage<'s>,
    frames: VecDeque<Vec<u8>>,
    left: bool,
}

impl<'s> Connector for &'s Stage<'s> {
    type Transport = Line<'s>;

    async fn connect(&mut self) -> Result<Line<'s>, TransportError> {
        Ok(Line { stage: self, frames: VecDeque::new(), left: false })
    }
}

impl Transport for Line<'_> {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        let message = wire::decode::<ClientMessage>(&frame).map_err(|e| TransportError::Lost(e.to_string()))?;
        let (said, leaves) = self.stage.answers(message).await.map_err(|e| TransportError::Lost(format!("{e:#}")))?;
        self.frames.extend(said.iter().map(wire::encode));
        self.left |= leaves;
        Ok(())
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        match self.frames.pop_front() {
            Some(frame) => Ok(frame),
            None if self.left => Err(TransportError::Left),
            None => Err(TransportError::Lost("the played server has nothing to say".into())),
        }
    }
}

/// Time stands still.
struct Still;

impl Clock for Still {
    async fn sleep(&self, _: Duration) {}
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// Hears of steps.
#[derive(Default)]
struct Steps(Vec<(u32, usize)>);

impl Observer for Steps {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Step { round, step, .. } = event {
            self.0.push((round, step));
        }
    }
}

/// Take part to the end; the outcome, and (round, step) of each step.
pub(super) async fn take_part<'a, S: Keeper>(
    bench: &Bench,
    stage: &'a Stage<'a>,
    keeper: &mut S,
) -> anyhow::Result<(Outcome, Vec<(u32, usize)>)> {
    let mut introduction = fednano_tests::introduction("me", &bench.halves.edge, &bench.cache);
    introduction.resume = keeper.kept().await.as_deref().and_then(token_of);
    let me = Participant {
        hello: introduction,
        edge: &bench.halves.edge,
        cache: &mut bench.cache.clone(),
        device: &bench.halves.device,
        max_tries: 1,
        keep_every: Duration::ZERO,
    };
    let (mut connector, mut steps) = (stage, Steps::default());
    let outcome = participate(me, &mut connector, &Still, keeper, &mut steps).await?;
    Ok((outcome, steps.0))
}
