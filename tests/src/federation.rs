//! Federations over real sockets and in one process.

use fednano_shared::client::Outcome;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::probe::shard;
use fednano_shared::settings::{FederationSettings, Strategy};
use fednano_shared::wire::Phase;
use fednano_tests::{Heard, LIMIT, Server, block, encode, take_part};

fn settings() -> FederationSettings {
    FederationSettings { rounds: 2, min_participants: 2, local_epochs: 3, learning_rate: 1e-2, ..Default::default() }
}

async fn two_clients(server: &Server) -> anyhow::Result<[(Outcome, Heard); 2]> {
    let edge = server.app.held_out.edge.clone();
    let data = [shard(DemoTheme::Workshop, 1, 16, 4), shard(DemoTheme::Garden, 2, 16, 4)];
    let caches = [encode(&edge, &data[0]).await?, encode(&edge, &data[1]).await?];
    let (mut a, mut b) = (Heard::default(), Heard::default());
    let (first, second) = tokio::join!(take_part(&edge, &caches[0], &server.socket, "a", &mut a), async {
        // Numbers follow the order of joining.
        while server.app.federation("test").is_some_and(|f| f.status().participants.is_empty()) {
            tokio::task::yield_now().await;
        }
        take_part(&edge, &caches[1], &server.socket, "b", &mut b).await
    },);
    Ok([(first?, a), (second?, b)])
}

pub fn two_native_clients() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(settings(), folder.path()).await?;
        let clients = two_clients(&server).await?;
        let federation = server.app.federation("test").ok_or_else(|| anyhow::anyhow!("no federation"))?;
        let status = federation.finished().await;
        anyhow::ensure!(
            status.history.len() == 3,
            "{} results, expected zero-shot and two rounds",
            status.history.len()
        );
        let (before, after) = (status.history[0].held_out.accuracy, status.history[2].held_out.accuracy);
        println!("held-out accuracy {before:.3} -> {after:.3}");
        anyhow::ensure!(after > before + 0.05, "accuracy did not rise: {before} -> {after}");
        for r in &status.history[1..] {
            anyhow::ensure!(r.participants.len() == 2, "round {} merged {:?}", r.round, r.participants);
        }
        for (outcome, heard) in &clients {
            anyhow::ensure!(
                *outcome == Outcome::Finished(federation.adapter()),
                "a client has other adapters than the server"
            );
            anyhow::ensure!(heard.0.iter().filter(|e| e.starts_with("uploaded")).count() == 2, "{:?}", heard.0);
        }
        for p in &status.participants {
            let t = p.traffic;
            anyhow::ensure!(
                t.activations_up > 0 && t.gradients_down > 0 && t.updates_up > 0 && t.adapters_down > 0,
                "{t:?}"
            );
        }
        server.stop().await
    })
}

pub fn reproducible() -> anyhow::Result<()> {
    block(LIMIT, async {
        let mut results = Vec::new();
        for strategy in [Strategy::Fisher, Strategy::Fisher, Strategy::FedAvg] {
            let folder = tempfile::tempdir()?;
            let settings = FederationSettings { strategy, rounds: 1, local_epochs: 1, ..settings() };
            let server = Server::start(settings, folder.path()).await?;
            two_clients(&server).await?;
            results.push(server.app.federation("test").map(|f| f.adapter()));
            server.stop().await?;
        }
        // Batches of several clients may be merged, which moves the last bits; the strategy moves far more.
        let values = |i: usize| {
            results[i].iter().flat_map(|a| a.0.values()).flat_map(|b| b.data.iter().copied()).collect::<Vec<f32>>()
        };
        let (same, other) =
            (fednano_tests::deviation(&values(1), &values(0)), fednano_tests::deviation(&values(2), &values(0)));
        println!("same strategy {same:.1e}, other strategy {other:.1e}");
        anyhow::ensure!(same < 1e-2, "the same seed gave adapters that differ by {same}");
        anyhow::ensure!(other > 10.0 * same, "the strategy makes no difference: {other} against {same}");
        Ok(())
    })
}

/// Kill the server in mid-round; the client waits, comes back as itself and the federation ends as it should.
pub fn restart() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 3, min_participants: 1, local_epochs: 4, ..Default::default() };
        let server = Server::start(settings.clone(), folder.path()).await?;
        let address = server.address().to_owned();
        let edge = server.app.held_out.edge.clone();
        let cache = encode(&edge, &shard(DemoTheme::Harbour, 3, 16, 4)).await?;
        let socket = server.socket.clone();
        let mut heard = Heard::default();
        let (outcome, restarted) = tokio::join!(take_part(&edge, &cache, &socket, "a", &mut heard), async {
            let federation = server.app.federation("test").ok_or_else(|| anyhow::anyhow!("no federation"))?;
            // In the middle of round 2.
            while federation.status().round < 2 || federation.status().participants[0].progress.0 < 2 {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            server.stop().await?;
            Server::start_on(&address, settings, folder.path()).await
        });
        let restarted = restarted?;
        anyhow::ensure!(matches!(outcome?, Outcome::Finished(_)), "the client did not finish");
        let status = restarted.app.federation("test").map(|f| f.status());
        let status = status.ok_or_else(|| anyhow::anyhow!("no federation"))?;
        anyhow::ensure!(status.phase == Phase::Finished && status.history.len() == 4, "{status:?}");
        anyhow::ensure!(status.participants.len() == 1, "it came back as somebody else: {:?}", status.participants);
        anyhow::ensure!(
            heard.0.iter().any(|e| e.starts_with("lost")) && heard.0.contains(&"joined resumed=true".to_owned()),
            "{:?}",
            heard.0
        );
        // What was trained before the loss is not trained again.
        let steps: Vec<_> = heard.0.iter().filter(|e| e.starts_with("step 2.")).collect();
        let mut unique = steps.clone();
        unique.dedup();
        anyhow::ensure!(
            steps == unique && heard.0.iter().any(|e| e.starts_with("round 2 from") && e != "round 2 from 0"),
            "{:?}",
            heard.0
        );
        restarted.stop().await
    })
}
