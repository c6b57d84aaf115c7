//! The tab's state: model, data, features, newest adapters. Every method takes `&self`, so that questions are answered while a
//! round is under way; no `RefCell` is borrowed over an await.

use crate::import::{self, Pictures};
use crate::keeper::TabKeeper;
use crate::socket::{Leave, Socket, Sockets, TabClock};
use crate::{events, gpu};
use burn::tensor::Device;
use fednano_shared::ask::Asking;
use fednano_shared::bundle::Manifest;
use fednano_shared::bundle::assemble::BundleLoader;
use fednano_shared::client::{self, ClientEvent, Connector, Observer, Outcome, Participant};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::picture::Picture;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::data::text::Encoded;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::generate::{self, AnswerOptions, Sampling};
use fednano_shared::ledger::Traffic;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe;
use fednano_shared::settings::Strategy;
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::{ClientKind, Hello, Purpose, SessionToken};
use serde::Deserialize;
use serde_json::json;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Any error of a command; its text is all that the page needs.
pub type Failure = Box<dyn std::error::Error>;

/// Tries in a row to reach the server, at most 10 s apart: a tab waits about half an hour for a server that went away.
const MAX_TRIES: u32 = 200;
/// The work of a round is kept at most this often.
const KEEP_EVERY: Duration = Duration::from_secs(2);
/// Longest answer.
const MAX_ANSWER_TOKENS: usize = 64;

/// A tab whose model comes piece by piece.
pub struct Loading {
    device: Device,
    bundle: BundleLoader,
}

impl Loading {
    /// Open the device, read the manifest and its small files.
    pub async fn open(manifest: &str, files: &BTreeMap<String, Vec<u8>>, device: &str) -> Result<Self, Failure> {
        let manifest = Manifest::from_json(manifest.as_bytes())?;
        let device = gpu::open(device).await?;
        let bundle = BundleLoader::open(manifest, files, &device)?;
        Ok(Self { device, bundle })
    }

    /// Load the next piece.
    pub fn add(&mut self, piece: &[u8]) -> Result<(), Failure> {
        Ok(self.bundle.add(piece)?)
    }

    /// All pieces are in.
    pub fn finish(self) -> Result<Session, Failure> {
        Ok(Session::new(self.bundle.finish()?, self.device))
    }
}

/// One participant's tab.
pub struct Session {
    device: Device,
    edge: NanoEdge,
    own: RefCell<Pictures>,
    data: RefCell<Rc<Dataset>>,
    /// Features of the data, but while a participation has them.
    cache: RefCell<Option<FeatureCache>>,
    latest: RefCell<Option<Rc<Latest>>>,
    /// Bytes of all questions so far.
    asked: Cell<Traffic>,
    joined: Cell<bool>,
    leave: RefCell<Rc<Leave>>,
}

/// The newest adapters that the tab knows.
struct Latest {
    adapter: AdapterState,
    /// Whose they are, in words.
    origin: String,
}

/// From the page.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JoinOptions {
    url: String,
    federation: String,
    name: String,
    device_text: String,
    edge_bytes: u64,
    /// Number by which the download of the edge weights was announced.
    download: Option<String>,
    resume: Option<SessionToken>,
}

impl Session {
    fn new(edge: NanoEdge, device: Device) -> Self {
        Self {
            device,
            edge,
            own: RefCell::default(),
            data: RefCell::default(),
            cache: RefCell::default(),
            latest: RefCell::default(),
            asked: Cell::default(),
            joined: Cell::new(false),
            leave: RefCell::default(),
        }
    }

    /// GFLOP/s.
    pub async fn speed(&self, now: impl Fn() -> f64) -> Result<f64, Failure> {
        Ok(gpu::speed(&self.device, now).await?)
    }

    /// Replace the data; features of the old are void.
    fn set_data(&self, data: Dataset) -> String {
        let summary = import::summary(&data);
        self.data.replace(Rc::new(data));
        self.cache.replace(None);
        summary
    }

    /// A generated shard.
    pub fn load_demo(&self, theme: &str, seed: u32, pictures: usize, questions: usize) -> Result<String, Failure> {
        let Some(theme) = DemoTheme::ALL.into_iter().find(|t| t.name() == theme) else {
            return Err(format!("'{theme}' is no demo shard; choose workshop, garden or harbour").into());
        };
        Ok(self.set_data(probe::shard(theme, u64::from(seed), pictures, questions)))
    }

    /// An own picture.
    pub fn add_picture(&self, name: &str, width: usize, height: usize, rgba: &[u8]) -> Result<(), Failure> {
        // Large ones are kept as the model sees them.
        let picture = self.edge.preprocess().fit(import::from_rgba(width, height, rgba)?)?;
        self.own.borrow_mut().add(name, picture);
        Ok(())
    }

    /// Questions about own pictures.
    pub fn set_questions(&self, file_name: &str, text: &str) -> Result<String, Failure> {
        let data = self.own.borrow().with_questions(file_name, text)?;
        Ok(self.set_data(data))
    }

    /// Forget data and own pictures.
    pub fn clear_data(&self) {
        self.own.take();
        self.set_data(Dataset::default());
    }

    /// The data.
    pub fn data(&self) -> Rc<Dataset> {
        Rc::clone(&self.data.borrow())
    }

    /// One picture.
    pub fn picture(&self, index: usize) -> Result<Picture, Failure> {
        let data = self.data();
        data.pictures
            .get(index)
            .cloned()
            .ok_or_else(|| format!("there is no picture {index}; there are {}", data.pictures.len()).into())
    }

    /// One sample as JSON.
    pub fn sample(&self, index: usize) -> Result<String, Failure> {
        match self.data().samples.get(index) {
            Some(s) => Ok(json!({ "picture": s.picture, "question": s.question, "answer": s.answer }).to_string()),
            None => Err(format!("there is no sample {index}; choose a smaller number").into()),
        }
    }

    /// Compute and keep the features.
    pub async fn encode(&self, progress: impl FnMut(usize, usize)) -> Result<(), Failure> {
        let data = self.data();
        let cache = self.edge.encode(&data, progress).await?;
        // Other data may have been chosen meanwhile.
        if Rc::ptr_eq(&data, &self.data()) {
            self.cache.replace(Some(cache));
        }
        Ok(())
    }

    /// Take part; `on_event` hears JSON.
    pub async fn join(
        &self,
        options: &str,
        mut keeper: TabKeeper,
        on_event: impl FnMut(&str),
    ) -> Result<String, Failure> {
        let options: JoinOptions = serde_json::from_str(options)?;
        if self.joined.get() {
            return Err("this tab takes part already; leave first".into());
        }
        // Given away, so that its pictures are not in memory in two forms.
        let cache = self.cache.take();
        let Some(mut cache) = cache.filter(|c| !c.samples.is_empty()) else {
            return Err("there are no prepared pictures or questions; choose some first".into());
        };
        self.joined.set(true);
        let data = self.data();
        let leave = Rc::new(Leave::default());
        self.leave.replace(Rc::clone(&leave));
        let hello = Hello {
            federation: options.federation,
            name: options.name,
            kind: ClientKind::Tab,
            device: options.device_text,
            samples: cache.samples.len() as u32,
            edge_bytes: options.edge_bytes,
            purpose: Purpose::Train,
            resume: options.resume,
            offer: Offer::of(&cache, &self.edge),
            download: options.download,
        };
        let (edge, device) = (&self.edge, &self.device);
        let me = Participant { hello, edge, cache: &mut cache, device, max_tries: MAX_TRIES, keep_every: KEEP_EVERY };
        let mut sockets = Sockets { url: options.url, leave: Rc::clone(&leave) };
        let mut listener = Listener { session: self, alone: false, on_event };
        let clock = TabClock { leave };
        let result = client::participate(me, &mut sockets, &clock, &mut keeper, &mut listener).await;
        self.joined.set(false);
        // For whoever rejoins, unless other data have been chosen meanwhile.
        if Rc::ptr_eq(&data, &self.data()) {
            self.cache.replace(Some(cache));
        }
        let outcome = match result? {
            Outcome::Finished { adapter, own, .. } => {
                let (adapter, whose) = match own {
                    Some(own) => (own, "yours"),
                    None => (adapter, "the federation's"),
                };
                self.keep(adapter, format!("{whose}, all rounds done"));
                "finished"
            }
            Outcome::Left => "left",
        };
        Ok(json!({ "outcome": outcome }).to_string())
    }

    /// End [`Self::join`].
    pub fn leave(&self) {
        let leave = Rc::clone(&self.leave.borrow());
        leave.request();
    }

    fn keep(&self, adapter: AdapterState, origin: String) {
        self.latest.replace(Some(Rc::new(Latest { adapter, origin })));
    }

    /// Two answers as JSON: the untouched model's, and with the newest adapters (null before there are any). Picture or question
    /// may be absent.
    pub async fn ask(
        &self,
        url: String,
        federation: String,
        picture: Option<&Picture>,
        question: &str,
        on_text: impl Fn(&str, &str) -> bool,
    ) -> Result<String, Failure> {
        let question = question.trim();
        // People leave it out.
        let mark = if question.ends_with(char::is_alphanumeric) { "?" } else { "" };
        let question = format!("{question}{mark}");
        let (prompt, features) = match picture {
            Some(picture) => {
                let features = self.edge.image_features(&[picture]).await?.concat();
                (self.edge.text.encode(&question, None)?, features)
            }
            None => (self.edge.text.encode_text(&question, None)?, Vec::new()),
        };
        let mut boundary = self.connect(url, federation).await?;
        let answers = self.answers(&mut boundary, (&prompt, &features), on_text).await;
        // Whatever came of it, these have gone over the network.
        let mut asked = self.asked.get();
        asked.add(&boundary.traffic());
        self.asked.set(asked);
        answers
    }

    /// Bytes of all questions so far, as JSON.
    pub fn asked(&self) -> Result<String, Failure> {
        Ok(serde_json::to_string(&self.asked.get())?)
    }

    /// Both answers over a connection.
    async fn answers(
        &self,
        boundary: &mut Asking<Socket>,
        prompt: (&Encoded, &[f32]),
        on_text: impl Fn(&str, &str) -> bool,
    ) -> Result<String, Failure> {
        let latest = self.latest.borrow().clone();
        let options = AnswerOptions { max_tokens: MAX_ANSWER_TOKENS, sampling: Sampling::GREEDY };
        let tuned = latest.as_ref().map(|l| NanoAdapters::from_state(&l.adapter, &self.device));
        let answer = async |which: &'static str, adapters: Option<&NanoAdapters>, boundary: &mut Asking<Socket>| {
            let tell = |text: &str| on_text(which, text);
            generate::answer(&self.edge, adapters, prompt, options, boundary, &self.device, tell).await
        };
        let before = answer("before", None, boundary).await?;
        let after = match &tuned {
            None => None,
            Some(adapters) => Some(answer("after", Some(adapters), boundary).await?),
        };
        boundary.stop().await;
        let origin = latest.as_ref().map(|l| l.origin.as_str());
        Ok(json!({ "before": before, "after": after, "adapters": origin }).to_string())
    }

    /// Results of the probe as JSON.
    pub async fn probe(&self, url: String, federation: String) -> Result<String, Failure> {
        let mut boundary = self.connect(url, federation).await?;
        let result = probe::run(&self.edge, &mut boundary, &self.device).await?;
        Ok(serde_json::to_string(&result)?)
    }

    /// A connection for questions.
    async fn connect(&self, url: String, federation: String) -> Result<Asking<Socket>, Failure> {
        let mut sockets = Sockets { url, leave: Rc::default() };
        let hello = Hello {
            federation,
            name: "a question".to_owned(),
            kind: ClientKind::Tab,
            device: String::new(),
            samples: 0,
            edge_bytes: 0,
            purpose: Purpose::Ask,
            resume: None,
            offer: Offer { table: self.edge.table_form(), ..Offer::default() },
            download: None,
        };
        Ok(Asking::open(sockets.connect().await?, hello).await?)
    }
}

/// Keeps adapters for questions, tells the page the rest.
struct Listener<'a, F> {
    session: &'a Session,
    /// Nothing is merged: what the federation sends stays the untouched model.
    alone: bool,
    on_event: F,
}

impl<F: FnMut(&str)> Observer for Listener<'_, F> {
    fn event(&mut self, event: ClientEvent<'_>) {
        match &event {
            ClientEvent::Joined { settings, .. } => self.alone = settings.strategy == Strategy::Local,
            // Round 1 begins with the untouched model.
            ClientEvent::Round { round, adapter, .. } if *round > 1 && !self.alone => {
                self.session.keep((*adapter).clone(), format!("the federation's after round {}", round - 1));
            }
            ClientEvent::Uploaded { round, adapter } => {
                self.session.keep((*adapter).clone(), format!("yours after round {round}"));
            }
            _ => {}
        }
        (self.on_event)(&events::to_json(&event));
    }
}
