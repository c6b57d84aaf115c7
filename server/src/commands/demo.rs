//! `fednano demo`: a server with participants, to look at or, headless, to check that everything works together.

use super::SettingFlags;
use super::join::take_part;
use super::serve::{base_url, cancel_on_signal, has_page};
use crate::app::{App, HALF_OF_MEMORY, HeldOutSource, ServerSettings, bind};
use crate::coordinator::Federation;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::fetch::resolve_model;
use crate::llm_host::Order;
use crate::store::TemporaryFolder;
use anyhow::Context;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::client::Forgetful;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::ledger::{self, Traffic};
use fednano_shared::probe::shard;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{ClientKind, ParticipantId, Phase, Status};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// A server with nano-llava and participants: your browser, or headless ones.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face's layout, or a model of the hub as owner/name after `fednano fetch owner/name`.
    #[arg(long, default_value = "server/models/nano-llava")]
    model: String,
    /// Folder of the page.
    #[arg(long, default_value = "www")]
    www: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// Where the LLM runs.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
    /// How clients get the weights of their half of the model: f16, or smaller and coarser int8 or int4.
    #[arg(long, default_value_t = EdgeDtype::F16)]
    edge_dtype: EdgeDtype,
    /// Take part with so many headless Chromium tabs instead of a person's (the third is forced onto WebGPU), print one JSON
    /// line, end. 0: native participants only.
    #[arg(long)]
    headless: Option<usize>,
    /// Native participants.
    #[arg(long)]
    native: Option<usize>,
    /// Pictures of each participant's shard.
    #[arg(long, default_value_t = 48)]
    pictures: usize,
    /// Questions a picture.
    #[arg(long, default_value_t = 4)]
    questions: usize,
    /// Seed of the generated shards and of the held-out scenes.
    #[arg(long, default_value_t = 0)]
    data_seed: u64,
    /// A headless demo that takes longer has failed, seconds.
    #[arg(long, default_value_t = 1500)]
    timeout: u64,
    #[command(flatten)]
    settings: SettingFlags,
}

impl Args {
    fn shard_seed(&self, number: usize) -> u64 {
        1000 * self.data_seed + 1 + number as u64
    }
}

/// Run it.
///
/// # Errors
/// Anything that keeps it from starting; headless also when accuracy did not rise or a tab missed a round.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let tabs = args.headless.unwrap_or(0);
    let attended = args.headless.is_none();
    let native = args.native.unwrap_or(if attended { 2 } else { 0 });
    // The person's tab is one more.
    let expected = native + tabs + usize::from(attended);
    anyhow::ensure!(expected > 0, "nobody would take part; give --native or --headless a number above 0");
    let defaults = FederationSettings {
        min_participants: expected,
        rounds: if attended { 5 } else { 3 },
        local_epochs: 2,
        // Few samples: small batches make more steps of them.
        batch_size: 4,
        ..Default::default()
    };
    let settings = args.settings.settings(defaults)?;
    settings
        .validate_for_server()
        .map_err(|faults| anyhow::anyhow!("these settings cannot be served: {}", faults.join("; ")))?;
    let listen = if attended { &args.listen } else { "127.0.0.1:0" };
    let listener = bind(listen).await?;
    let model = resolve_model(&args.model)?;
    let (device, device_name) = args.device.open()?;
    let dtype = args.dtype.choose(&model, &device, &device_name)?;
    anyhow::ensure!(has_page(&args.www), "{} holds no built page; run `just web` first", args.www.display());
    let folder = TemporaryFolder::create("demo")?;
    let server = ServerSettings {
        model,
        www: args.www.clone(),
        data_dir: folder.path().to_owned(),
        edge_dtype: args.edge_dtype,
        federations: BTreeMap::from([("demo".to_owned(), settings.clone())]),
        held_out: HeldOutSource::Demo(args.data_seed),
        evaluation_limit: 0,
        order: Order::Arrival { merge: true },
        feature_cache: HALF_OF_MEMORY,
    };
    let shutdown = CancellationToken::new();
    let app = App::start(server, (&device, dtype), shutdown.clone()).await?;
    cancel_on_signal(shutdown);
    let link = format!("{}/?federation=demo", base_url(listener.local_addr()?));
    let federation = app.federation("demo").context("the federation did not start")?;
    let started = Instant::now();
    for number in 0..native {
        join_in_background(number, link.clone(), args)?;
    }
    let mut browsers = Browsers::default();
    if attended {
        println!(
            "the LLM runs on {device_name}; native participants: {native}; the rounds begin when you join\n\n  open {link}\n\nCtrl-C ends the demo"
        );
        return tokio::select! {
            served = app.serve(listener) => served,
            () = async {
                let status = federation.finished().await;
                // Ctrl-C ends it too.
                if status.phase == Phase::Finished {
                    println!("\nall rounds are done: held-out accuracy {}", accuracies(&status));
                    println!(
                        "\nof all participants together, as counted here:\n{}",
                        table(&all_gone(&federation).await)
                    );
                    println!("the page stays open for questions until Ctrl-C");
                }
                std::future::pending::<()>().await;
            } => Ok(()),
        };
    }
    for number in 0..tabs {
        browsers.open(number, &link, args)?;
    }
    let status = tokio::select! {
        served = app.serve(listener) => {
            served?;
            anyhow::bail!("the server stopped before the rounds were done");
        }
        status = async {
            federation.finished().await;
            all_gone(&federation).await
        } => status,
        cause = browsers.ended() => {
            anyhow::bail!("{cause}; the federation stands at {}", serde_json::to_string(&federation.status())?);
        }
        () = tokio::time::sleep(Duration::from_secs(args.timeout)) => {
            let status = serde_json::to_string(&federation.status())?;
            anyhow::bail!("not finished after {} s; the federation stands at {status}", args.timeout);
        }
    };
    browsers.close();
    drop(folder);
    eprintln!("of all participants together:\n{}", table(&status));
    println!("{}", report(&status, started.elapsed().as_secs_f64()));
    judge(&status, tabs)
}

/// Whoever is still here after the last round has so long to say goodbye.
const GOODBYE: Duration = Duration::from_secs(10);

/// The status once all participants are gone, or it took too long: only then are all their bytes counted.
async fn all_gone(federation: &Federation) -> Status {
    let since = Instant::now();
    loop {
        let status = federation.status();
        if since.elapsed() > GOODBYE || status.participants.iter().all(|p| !p.connected) {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn table(status: &Status) -> String {
    ledger::table(&Traffic::sum(status.participants.iter().map(|p| &p.traffic)))
}

fn accuracies(status: &Status) -> String {
    status.history.iter().map(|r| format!("{:.1} %", r.held_out.accuracy * 100.0)).collect::<Vec<_>>().join(" -> ")
}

/// A native participant's name: its theme, and a number where an earlier one has that theme too. The report tells them apart by it.
fn native_name(number: usize) -> String {
    let (themes, theme) = (DemoTheme::ALL.len(), DemoTheme::ALL[number % DemoTheme::ALL.len()].name());
    if number < themes { format!("native-{theme}") } else { format!("native-{theme}-{}", number / themes + 1) }
}

/// A native participant over the real socket, on a thread of its own.
fn join_in_background(number: usize, link: String, args: &Args) -> anyhow::Result<()> {
    let (theme, name) = (DemoTheme::ALL[number % DemoTheme::ALL.len()], native_name(number));
    let (seed, pictures, questions) = (args.shard_seed(number), args.pictures, args.questions);
    std::thread::Builder::new().name(format!("native-{number}")).spawn(move || {
        let data = shard(theme, seed, pictures, questions);
        let leave = CancellationToken::new(); // never
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let result = match runtime {
            Ok(runtime) => runtime
                .block_on(take_part(&link, &name, |_| Ok(data), DeviceChoice::Cpu, 60, leave, &mut Forgetful))
                .map(drop),
            Err(e) => Err(e.into()),
        };
        if let Err(e) = result {
            eprintln!("[{name}] {e:#}");
        }
    })?;
    Ok(())
}

/// One JSON line: accuracy before and after each round, who took part, bytes by direction and kind, seconds.
fn report(status: &Status, seconds: f64) -> serde_json::Value {
    let name = |id: &ParticipantId| status.participants.iter().find(|p| p.id == *id).map_or("?", |p| p.name.as_str());
    let rounds: Vec<_> = status
        .history
        .windows(2)
        .map(|pair| {
            serde_json::json!({
                "round": pair[1].round, "accuracy_before": pair[0].held_out.accuracy, "accuracy_after": pair[1].held_out.accuracy,
                "participants": pair[1].participants.iter().map(name).collect::<Vec<_>>(), "seconds": pair[1].seconds,
            })
        })
        .collect();
    let participants: BTreeMap<_, _> = status
        .participants
        .iter()
        .map(|p| {
            (
                p.name.clone(),
                serde_json::json!({"kind": p.kind, "device": p.device, "samples": p.samples, "bytes": p.traffic}),
            )
        })
        .collect();
    serde_json::json!({"rounds": rounds, "participants": participants, "seconds": seconds})
}

fn judge(status: &Status, tabs: usize) -> anyhow::Result<()> {
    if let Some(r) = status.history.iter().find(|r| r.held_out.samples == 0) {
        anyhow::bail!("the evaluation of round {} covers no sample", r.round);
    }
    let accuracy = |r: Option<&fednano_shared::wire::RoundResult>| r.map_or(0.0, |r| r.held_out.accuracy);
    let (first, last) = (accuracy(status.history.first()), accuracy(status.history.last()));
    anyhow::ensure!(last > first, "held-out accuracy did not rise: {first:.3} before, {last:.3} after");
    let all: Vec<ParticipantId> =
        status.participants.iter().filter(|p| p.kind == ClientKind::Tab).map(|p| p.id).collect();
    anyhow::ensure!(all.len() == tabs, "{} tabs joined, expected {tabs}", all.len());
    for r in status.history.iter().skip(1) {
        anyhow::ensure!(
            all.iter().all(|t| r.participants.contains(t)),
            "round {} was merged without some tab: {:?}",
            r.round,
            r.participants
        );
    }
    Ok(())
}

/// Headless browsers, ended when dropped.
#[derive(Default)]
struct Browsers(Vec<Browser>);

struct Browser {
    tab: String,
    child: Child,
    profile: PathBuf,
}

/// How the third tab's browser gets WebGPU without a GPU.
pub const SOFTWARE_WEBGPU: [&str; 2] = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

impl Browsers {
    fn open(&mut self, number: usize, link: &str, args: &Args) -> anyhow::Result<()> {
        let program = chromium()?;
        let webgpu = number == 2;
        let theme = DemoTheme::ALL[number % DemoTheme::ALL.len()].name();
        let (device, name) =
            if webgpu { ("webgpu", "tab-webgpu".to_owned()) } else { ("cpu", format!("tab-cpu-{}", number + 1)) };
        let url = format!(
            "{link}&auto=1&device={device}&name={name}&shard={theme}&seed={}&pictures={}&questions={}",
            args.shard_seed(number),
            args.pictures,
            args.questions
        );
        let profile = std::env::temp_dir().join(format!("fednano-tab-{}-{number}", std::process::id()));
        drop(std::fs::remove_dir_all(&profile)); // a leftover of an earlier process of this number
        let mut command = Command::new(program);
        command.args([
            "--headless=new",
            "--no-sandbox",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ]);
        command.args(["--disable-sync", "--disable-background-timer-throttling", "--disable-renderer-backgrounding"]);
        if webgpu {
            command.args(SOFTWARE_WEBGPU);
        }
        command.arg(format!("--user-data-dir={}", profile.display())).arg(url);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("Chromium does not start")?;
        self.0.push(Browser { tab: name, child, profile });
        Ok(())
    }

    /// Wait until one ends by itself, which none should; which one, and how.
    async fn ended(&mut self) -> String {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            for browser in &mut self.0 {
                if let Ok(Some(status)) = browser.child.try_wait() {
                    return format!("the browser of {} ended early ({status})", browser.tab);
                }
            }
        }
    }

    fn close(&mut self) {
        for mut browser in self.0.drain(..) {
            drop(browser.child.kill());
            drop(browser.child.wait());
            drop(std::fs::remove_dir_all(browser.profile));
        }
    }
}

impl Drop for Browsers {
    fn drop(&mut self) {
        self.close();
    }
}

/// The installed Chromium.
///
/// # Errors
/// None is found.
pub fn chromium() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return Ok(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| std::env::split_paths(&path).map(move |dir| dir.join(name)))
        .find(|p| p.is_file())
        .context("no Chromium is installed; run `just setup`, or name one in the variable CHROMIUM")
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::step::Evaluation;
    use fednano_shared::wire::RoundResult;

    fn status(evaluations: [(f64, usize); 2]) -> Status {
        let result = |(round, (accuracy, samples))| RoundResult {
            round,
            held_out: Evaluation { accuracy, loss: 1.0, samples },
            participants: Vec::new(),
            late: Vec::new(),
            local: None,
            training_loss: None,
            seconds: 0.0,
        };
        Status {
            federation: "demo".into(),
            phase: Phase::Finished,
            round: 1,
            rounds: 1,
            participants: Vec::new(),
            history: (0..).zip(evaluations).map(result).collect(),
            min_participants: 1,
        }
    }

    #[test]
    fn native_participants_have_names_of_their_own() {
        assert_eq!([0, 3, 7].map(native_name), ["native-workshop", "native-workshop-2", "native-garden-3"]);
        let names: std::collections::BTreeSet<String> = (0..10).map(native_name).collect();
        assert_eq!(names.len(), 10, "{names:?}");
    }

    #[test]
    fn a_risen_accuracy_of_real_evaluations_is_judged_well() {
        judge(&status([(0.2, 90), (0.6, 90)]), 0).unwrap();
        assert!(judge(&status([(0.6, 90), (0.6, 90)]), 0).unwrap_err().to_string().contains("did not rise"));
        assert!(judge(&status([(0.2, 90), (0.6, 90)]), 1).unwrap_err().to_string().contains("0 tabs"));
    }

    #[test]
    fn an_evaluation_of_nothing_is_a_failure() {
        for evaluations in [[(0.0, 0), (0.6, 90)], [(0.2, 90), (0.6, 0)]] {
            let words = judge(&status(evaluations), 0).unwrap_err().to_string();
            assert!(words.contains("covers no sample"), "{words}");
        }
    }
}
