//! What happens to a participant, as JSON for the page.

use fednano_shared::client::ClientEvent;
use fednano_shared::ledger::Traffic;
use serde_json::json;
use std::collections::BTreeMap;

/// Bytes are told by round for so many of the newest ones: it is done every second, however many there were.
const ROUNDS: usize = 100;

/// One event; `type` says which.
pub fn to_json(event: &ClientEvent<'_>) -> String {
    let value = match event {
        ClientEvent::Joined { participant, token, settings, agreement, resumed } => json!({
            "type": "joined", "participant": participant, "token": token, "settings": settings, "agreement": agreement,
            "resumed": resumed,
        }),
        ClientEvent::Status(status) => json!({ "type": "status", "status": status }),
        ClientEvent::Round { round, from_step, steps, .. } => {
            json!({ "type": "round", "round": round, "fromStep": from_step, "steps": steps })
        }
        ClientEvent::Step { round, step, steps, loss, samples } => {
            json!({ "type": "step", "round": round, "step": step, "steps": steps, "loss": loss, "samples": samples })
        }
        ClientEvent::Fisher { round, done, all } => {
            json!({ "type": "fisher", "round": round, "done": done, "all": all })
        }
        ClientEvent::Uploaded { round, .. } => json!({ "type": "uploaded", "round": round }),
        ClientEvent::Waiting { round } => json!({ "type": "waiting", "round": round }),
        ClientEvent::Local { round, local } => json!({ "type": "local", "round": round, "local": local }),
        ClientEvent::Traffic { rounds } => {
            let newest: BTreeMap<_, _> = rounds.iter().rev().take(ROUNDS).collect();
            json!({ "type": "traffic", "traffic": Traffic::sum(rounds.values()), "rounds": newest })
        }
        ClientEvent::NotCounted { round, fault } => json!({ "type": "notCounted", "round": round, "fault": fault }),
        ClientEvent::Lost { cause, retry_in } => {
            json!({ "type": "lost", "cause": cause, "retryMs": retry_in.as_millis() as u64 })
        }
    };
    value.to_string()
}
