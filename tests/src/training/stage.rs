//! A server that the test plays, and a participant of it.

use super::Bench;
use fednano_shared::client::keep::token_of;
use fednano_shared::client::{
    ClientEvent, Clock, Connector, Keeper, Observer, Outcome, Participant, Transport, TransportError, participate,
};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::{AdapterState, BoundaryRequest};
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::{FrozenLlm, InProcess, LlmBoundary};
use fednano_shared::wire::{
    self, ClientMessage, Hello, LocalEvaluation, ParticipantId, Phase, Purpose, ServerMessage, SessionToken, Status,
    Update,
};
use fednano_tests::hello;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;

/// A server that the test plays: it answers at once, and sends the same adapters in every round.
pub(super) struct Stage<'a> {
    llm: &'a FrozenLlm,
    settings: FederationSettings,
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
        Self {
            llm: &bench.halves.llm,
            settings: settings.clone(),
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
            status,
        }
    }

    async fn answers(&self, message: ClientMessage) -> anyhow::Result<Option<Vec<ServerMessage>>> {
        Ok(Some(match message {
            ClientMessage::Hello(hello) => vec![self.welcome(&hello), self.order()],
            ClientMessage::Train { id, round, request } => {
                let number = self.trained.borrow().len();
                if self.leave_after.get().is_some_and(|limit| number >= limit) {
                    return Ok(None);
                }
                self.trained.borrow_mut().push((round, request.clone()));
                let reply = InProcess(self.llm).train(request).await?;
                let news = (self.hurry_at.get() == Some(number)).then(|| self.next_round());
                news.into_iter().chain([ServerMessage::Trained { id, reply }]).collect()
            }
            ClientMessage::Evaluate { id, request } => {
                self.evaluated.borrow_mut().push(request.clone());
                vec![ServerMessage::Evaluated { id, reply: InProcess(self.llm).evaluate(request).await? }]
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
        }))
    }
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
        match self.stage.answers(message).await.map_err(|e| TransportError::Lost(e.to_string()))? {
            Some(answers) => self.frames.extend(answers.iter().map(wire::encode)),
            None => self.left = true,
        }
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

/// A keeper in memory.
#[derive(Default)]
pub(super) struct Notes(pub(super) Option<Vec<u8>>);

impl Keeper for Notes {
    async fn keep(&mut self, snapshot: &[u8]) {
        self.0 = Some(snapshot.to_vec());
    }
    async fn kept(&mut self) -> Option<Vec<u8>> {
        self.0.clone()
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
pub(super) async fn take_part<S: Keeper>(
    bench: &Bench,
    stage: &Stage<'_>,
    keeper: &mut S,
) -> anyhow::Result<(Outcome, Vec<(u32, usize)>)> {
    let mut introduction = hello("me", bench.cache.samples.len(), Purpose::Train);
    introduction.resume = keeper.kept().await.as_deref().and_then(token_of);
    let me = Participant {
        hello: introduction,
        edge: &bench.halves.edge,
        cache: &bench.cache,
        device: &bench.halves.device,
        max_tries: 1,
        keep_every: Duration::ZERO,
    };
    let (mut connector, mut steps) = (stage, Steps::default());
    let outcome = participate(me, &mut connector, &Still, keeper, &mut steps).await?;
    Ok((outcome, steps.0))
}
