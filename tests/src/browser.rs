//! In headless Chromium, driven through ChromeDriver: the step in wasm and on WebGPU, tabs in a federation, the page's errors.

use anyhow::Context;
use clap::Parser;
use fantoccini::{Client, ClientBuilder, Locator};
use fednano_server::commands::demo;
use fednano_shared::probe::ProbeResult;
use fednano_shared::settings::FederationSettings;
use fednano_tests::{Server, block, on_path};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Software WebGPU compiles its shaders slowly, and machines are shared.
pub(crate) const LIMIT: Duration = Duration::from_secs(540);

/// ChromeDriver with one session; both end when dropped.
pub(crate) struct Browser {
    driver: Child,
    /// ChromeDriver's, for commands that fantoccini lacks.
    pub(crate) port: u16,
    pub(crate) client: Client,
    _profile: tempfile::TempDir,
}

impl Browser {
    pub(crate) async fn open(extra: &[&str]) -> anyhow::Result<Self> {
        let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let program = on_path("chromedriver").context("no chromedriver")?;
        let driver =
            Command::new(program).arg(format!("--port={free}")).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let profile = tempfile::tempdir()?;
        let mut arguments: Vec<String> = [
            "--headless=new",
            "--no-sandbox",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--window-size=1100,900",
        ]
        .iter()
        .map(|s| (*s).to_owned())
        .collect();
        arguments.push(format!("--user-data-dir={}", profile.path().display()));
        arguments.extend(extra.iter().map(|s| (*s).to_owned()));
        let binary = demo::chromium()?;
        let options = serde_json::json!({"args": arguments, "binary": binary});
        let capabilities = serde_json::Map::from_iter([("goog:chromeOptions".to_owned(), options)]);
        let mut tries = 0;
        let client = loop {
            match ClientBuilder::new(hyper_client())
                .capabilities(capabilities.clone())
                .connect(&format!("http://127.0.0.1:{free}"))
                .await
            {
                Ok(client) => break client,
                Err(e) if tries >= 100 => return Err(e).context("ChromeDriver gives no session"),
                Err(_) => tries += 1,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        Ok(Self { driver, port: free, client, _profile: profile })
    }

    pub(crate) async fn script(&self, code: &str) -> anyhow::Result<serde_json::Value> {
        Ok(self.client.execute(code, Vec::new()).await?)
    }

    /// Wait until a script yields a true value.
    pub(crate) async fn wait(&self, what: &str, code: &str) -> anyhow::Result<serde_json::Value> {
        let started = std::time::Instant::now();
        loop {
            let value = self.script(code).await?;
            if !value.is_null() && value != false && value != "" {
                return Ok(value);
            }
            if started.elapsed() > Duration::from_secs(420) {
                let page =
                    self.script("return document.body.innerText + JSON.stringify(document.body.dataset)").await?;
                anyhow::bail!("the page never got to: {what}; it shows: {page}");
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What probe.html computes at this address, as JSON.
    pub(crate) async fn result(&self, address: &str) -> anyhow::Result<String> {
        self.client.goto(address).await?;
        let ended = "const s = document.body.dataset.state; return s === 'done' || s === 'error' ? s : null";
        let state = self.wait("a result", ended).await?;
        let text = self.client.find(Locator::Css("#result")).await?.text().await?;
        anyhow::ensure!(state == "done", "{address} failed: {text}");
        Ok(text)
    }

    pub(crate) async fn close(mut self) -> anyhow::Result<()> {
        self.client.clone().close().await?;
        self.driver.kill()?;
        self.driver.wait()?;
        Ok(())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}

/// ChromeDriver speaks plain HTTP on this machine.
fn hyper_client() -> hyper_util::client::legacy::connect::HttpConnector {
    hyper_util::client::legacy::connect::HttpConnector::new()
}

async fn probe(device: &str, flags: &[&str]) -> anyhow::Result<()> {
    let browser = Browser::open(flags).await?;
    for (boundary, mode) in fednano_tests::MODES {
        println!("{mode}");
        let folder = tempfile::tempdir()?;
        let server =
            Server::start(FederationSettings { boundary, ..FederationSettings::exact() }, folder.path()).await?;
        let text = browser.result(&format!("{}/probe.html?federation=test&device={device}", server.base)).await?;
        let got: ProbeResult = serde_json::from_str(&text)?;
        crate::devices::compare(&got, &crate::devices::native(mode).await?)?;
        server.stop().await?;
    }
    browser.close().await
}

pub fn wasm_flex_equals_native() -> anyhow::Result<()> {
    block(LIMIT, probe("cpu", &[]))
}

pub fn webgpu_equals_native() -> anyhow::Result<()> {
    block(LIMIT, probe("webgpu", &demo::SOFTWARE_WEBGPU))
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: demo::Args,
}

/// The headless demo with two tabs: it fails by itself unless accuracy rises and both tabs take part in every round.
pub fn two_tabs() -> anyhow::Result<()> {
    let root = fednano_tests::repository();
    let (model, www) = (fednano_tests::nano_llava().display().to_string(), root.join("www").display().to_string());
    let arguments = [
        "demo",
        "--headless",
        "2",
        "--rounds",
        "3",
        "--device",
        "cpu",
        "--timeout",
        "500",
        "--model",
        &model,
        "--www",
        &www,
    ];
    let args = Cli::try_parse_from(arguments)?.args;
    block(LIMIT, async { demo::main(&args).await })
}

/// What the page says when something is wrong: cause and remedy, in its banner.
pub fn page_errors() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let browser = Browser::open(&["--disable-features=WebGPU", "--disable-gpu"]).await?;
        let banner = "return document.body.dataset.error || null";
        for (query, words) in [
            ("?federation=elsewhere", ["elsewhere", "invite link"]),
            // No WebGPU is an error only where somebody insists on it.
            ("?federation=test&device=webgpu", ["WebGPU", "remove device=webgpu"]),
        ] {
            browser.client.goto(&format!("{}/{query}", server.base)).await?;
            let said = browser.wait("an error", banner).await?.to_string();
            println!("{said}");
            anyhow::ensure!(words.iter().all(|w| said.contains(w)), "{words:?} are not in: {said}");
            let shown = browser.script("return document.querySelector('[role=alert]').innerText").await?.to_string();
            anyhow::ensure!(shown.contains(words[0]), "the banner does not show it: {shown}");
        }
        browser.client.goto(&format!("{}/?federation=test", server.base)).await?;
        let state = browser.wait("ready", "return document.body.dataset.state === 'ready'").await?;
        anyhow::ensure!(state == true);
        let device = browser.script("return document.body.innerText").await?.to_string();
        anyhow::ensure!(
            device.contains("WebAssembly") || device.contains("processor"),
            "the page does not say where it computes: {device}"
        );
        browser.close().await?;
        server.stop().await
    })
}

/// The server goes away in mid-round: the page says so, and goes on when it is back.
pub fn server_restart() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 2, min_participants: 1, local_epochs: 6, ..Default::default() };
        let server = Server::start(settings.clone(), folder.path()).await?;
        let address = server.address().to_owned();
        let browser = Browser::open(&[]).await?;
        browser
            .client
            .goto(&format!(
                "{}/?federation=test&auto=1&device=cpu&shard=garden&pictures=12&questions=4&seed=3",
                server.base
            ))
            .await?;
        browser
            .wait(
                "some steps",
                "return window.fednano && window.fednano.events.some(e => e.type === 'step' && e.step >= 3)",
            )
            .await?;
        server.stop().await?;
        browser.wait("words for the loss", "return document.body.dataset.connection === 'lost'").await?;
        let words = browser.script("return document.body.innerText").await?.to_string();
        anyhow::ensure!(words.contains("again"), "the page does not say that it tries again: {words}");
        let server = Server::start_on(&address, settings, folder.path()).await?;
        browser.wait("the end", "return document.body.dataset.state === 'finished'").await?;
        let resumed =
            browser.script("return window.fednano.events.some(e => e.type === 'joined' && e.resumed)").await?;
        anyhow::ensure!(resumed == true, "the tab came back as somebody else");
        browser.close().await?;
        server.stop().await
    })
}
