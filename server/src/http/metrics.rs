//! Figures of all federations in the text format of Prometheus (OpenMetrics). They are written anew for each reader: what is counted
//! is counted elsewhere.

use fednano_shared::ledger::{AFTER, Traffic};
use fednano_shared::wire::Status;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;

/// What the text is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What there is to tell of a federation.
pub(super) struct Figures {
    /// Its participants with their bytes, its results.
    pub(super) status: Status,
    /// Bytes of everybody.
    pub(super) total: Traffic,
    /// The same by round, the newest of them.
    pub(super) rounds: BTreeMap<u32, Traffic>,
}

type Labels = Vec<(&'static str, String)>;
type Counts = Family<Labels, Counter>;
type Values = Family<Labels, Gauge<f64, AtomicU64>>;

/// All of it.
///
/// # Errors
/// A number that the format does not know.
pub(super) fn text(federations: &[Figures]) -> Result<String, std::fmt::Error> {
    let (all, participants, rounds) = (Counts::default(), Counts::default(), Counts::default());
    let (round, connected, accuracy, loss) =
        (Values::default(), Values::default(), Values::default(), Values::default());
    for Figures { status, total, rounds: by_round } in federations {
        let own: Labels = vec![("federation", status.federation.clone())];
        let set = |values: &Values, value: f64| {
            values.get_or_create(&own).set(value);
        };
        count(&all, &own, total);
        for p in &status.participants {
            let labels = [own.clone(), vec![("participant", p.id.0.to_string())]].concat();
            count(&participants, &labels, &p.traffic);
        }
        for (number, traffic) in by_round {
            let name = if *number == AFTER { "after".to_owned() } else { number.to_string() };
            count(&rounds, &[own.clone(), vec![("round", name)]].concat(), traffic);
        }
        set(&round, f64::from(status.round));
        set(&connected, status.participants.iter().filter(|p| p.connected).count() as f64);
        if let Some(last) = status.history.last() {
            set(&accuracy, last.held_out.accuracy);
            set(&loss, last.held_out.loss);
        }
    }
    let mut registry = Registry::with_prefix("fednano");
    let mut bytes = |name: &str, help: &str, counts: Counts| {
        registry.register_with_unit(name, help, Unit::Bytes, counts);
    };
    bytes("traffic", "Bytes of a federation by direction (up: to the server) and kind", all);
    bytes("participant_traffic", "The same of each participant", participants);
    let help = "The same of each of the newest rounds, everybody together; 0: before the first, handshakes and questions; \
                after: after the last one";
    bytes("round_traffic", help, rounds);
    registry.register("round", "Round under way, 0 before the first", round);
    registry.register("participants_connected", "Participants that are here", connected);
    registry.register(
        "held_out_accuracy",
        "Right answers on held-out questions after the last round, 0 to 1",
        accuracy,
    );
    registry.register("held_out_loss", "Loss on them, nats", loss);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// Kinds of which there are none make no series.
fn count(counts: &Counts, labels: &[(&'static str, String)], traffic: &Traffic) {
    for (direction, bytes) in traffic.directions() {
        for (kind, number) in bytes.iter().filter(|(_, number)| *number > 0) {
            let mut labels = labels.to_vec();
            labels.extend([("direction", direction.to_owned()), ("kind", kind.name().to_owned())]);
            counts.get_or_create(&labels).inc_by(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::step::Evaluation;
    use fednano_shared::wire::{ClientKind, ParticipantId, ParticipantStatus, Phase, RoundResult};

    fn traffic(codes: u64) -> Traffic {
        let mut traffic = Traffic::default();
        (traffic.up.codes, traffic.down.edge_bundle) = (codes, 9);
        traffic
    }

    const ROUNDS: u32 = 3;

    fn figures() -> Figures {
        let participant = ParticipantStatus {
            id: ParticipantId(4),
            name: "a \"name\"\n".into(),
            kind: ClientKind::Tab,
            device: String::new(),
            samples: 1,
            connected: true,
            progress: (0, 0),
            loss: None,
            updated: false,
            traffic: traffic(5),
            local: None,
            selected: false,
        };
        let result = RoundResult {
            round: 0,
            held_out: Evaluation { accuracy: 0.25, loss: 1.5, samples: 4 },
            participants: Vec::new(),
            late: Vec::new(),
            local: None,
            training_loss: None,
            seconds: 0.0,
        };
        let status = Status {
            federation: "demo".into(),
            phase: Phase::Training,
            round: 3,
            rounds: 5,
            participants: vec![participant],
            history: vec![result],
            min_participants: 1,
        };
        let rounds = (0..ROUNDS).map(|round| (round, traffic(1))).chain([(AFTER, traffic(2))]).collect();
        Figures { status, total: traffic(7), rounds }
    }

    #[test]
    fn the_text_has_a_line_for_each_figure() {
        let text = text(&[figures()]).unwrap();
        for line in [
            "# TYPE fednano_traffic_bytes counter",
            "fednano_traffic_bytes_total{federation=\"demo\",direction=\"up\",kind=\"codes\"} 7",
            "fednano_traffic_bytes_total{federation=\"demo\",direction=\"down\",kind=\"edge_bundle\"} 9",
            "fednano_participant_traffic_bytes_total{federation=\"demo\",participant=\"4\",direction=\"up\",kind=\"codes\"} 5",
            "fednano_round_traffic_bytes_total{federation=\"demo\",round=\"after\",direction=\"up\",kind=\"codes\"} 2",
            "fednano_round_traffic_bytes_total{federation=\"demo\",round=\"0\",direction=\"up\",kind=\"codes\"} 1",
            "fednano_round_traffic_bytes_total{federation=\"demo\",round=\"2\",direction=\"up\",kind=\"codes\"} 1",
            "fednano_round{federation=\"demo\"} 3.0",
            "fednano_participants_connected{federation=\"demo\"} 1.0",
            "fednano_held_out_accuracy{federation=\"demo\"} 0.25",
            "fednano_held_out_loss{federation=\"demo\"} 1.5",
        ] {
            assert!(text.lines().any(|found| found == line), "'{line}' is not in\n{text}");
        }
        // In each direction one kind.
        assert_eq!(text.matches("fednano_round_traffic_bytes_total").count(), 2 * (ROUNDS as usize + 1));
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("name"), "names of strangers are no labels");
    }

    #[test]
    fn without_federations_there_is_nothing_to_tell() {
        assert_eq!(text(&[]).unwrap(), "# EOF\n");
    }
}
