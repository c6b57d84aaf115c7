//! Who takes part: joining, coming back, and what participants are told and shown.

use super::{Account, Coordinator, Federation, Joined, LINES, OUTBOX, TELL, TELL_AT_LAST};
use crate::store::{Metrics, SavedParticipant};
use fednano_shared::wire::{
    Fault, FaultCode, Hello, LocalEvaluation, ParticipantId, ParticipantStatus, ServerMessage, SessionToken, Status,
};
use std::time::Instant;
use tokio::sync::mpsc;

/// Participants known to a federation, whether they are here or not: so many, or twice those that it needs to start. Each is in
/// every status, and nothing else would bound what strangers can make a server keep.
const MOST_PARTICIPANTS: usize = 2_000;
/// Bytes that somebody is believed to have downloaded where nobody has counted them: a tebibyte. More would spoil the federation's sums
/// for good.
const MOST_DOWNLOADED: u64 = 1 << 40;

/// One that has joined at some time.
pub(super) struct Participant {
    /// As it is on disk.
    pub(super) saved: SavedParticipant,
    pub(super) progress: (u32, u32),
    pub(super) loss: Option<f32>,
    pub(super) local: Option<LocalEvaluation>,
    pub(super) account: Account,
    pub(super) outbox: Option<mpsc::Sender<ServerMessage>>,
    pub(super) connection: u64,
}

impl Participant {
    /// One that is not here, or not yet; with its bytes so far and its last own judgement.
    pub(super) fn away(saved: SavedParticipant, metrics: Metrics) -> Self {
        let (local, account) = (metrics.local, Account::kept(metrics.traffic));
        Self { saved, progress: (0, 0), loss: None, local, account, outbox: None, connection: 0 }
    }
}

/// Why somebody is not let in.
pub(super) enum Refused {
    /// For a cause of its own.
    Fault(Fault),
    /// It could not be written down.
    Disk(anyhow::Error),
}

/// Bytes of a download by the word of whoever made it.
fn believed(bytes: u64) -> u64 {
    bytes.min(MOST_DOWNLOADED)
}

impl Federation {
    /// Bytes of a download that were sent since they were claimed last; none: nobody has counted it here. Those of participants are
    /// claimed when they join.
    pub fn claim_download(&self, id: &str) -> Option<u64> {
        self.downloads.get().and_then(|claim| claim(id))
    }
}

impl Coordinator {
    /// Let somebody in, for the first time or again.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub(super) fn join(&mut self, hello: Hello) -> Result<Joined, Refused> {
        let known = hello
            .resume
            .as_ref()
            .and_then(|t| self.participants.iter().find(|(_, p)| p.saved.token == *t))
            .map(|(id, _)| *id);
        let most = MOST_PARTICIPANTS.max(self.settings.min_participants.saturating_mul(2));
        if known.is_none() && self.participants.len() >= most {
            return Err(Refused::Fault(full(most)));
        }
        let id = known.unwrap_or_else(|| ParticipantId(self.participants.keys().last().map_or(1, |id| id.0 + 1)));
        let token = match hello.resume.filter(|token| known.is_some() || token.is_sound()) {
            Some(token) => token,
            None => SessionToken::made_up().map_err(|cause| {
                Refused::Fault(Fault {
                    code: FaultCode::Server,
                    cause,
                    remedy: "ask the operator to look at the server".into(),
                })
            })?,
        };
        let saved = SavedParticipant {
            id,
            token: token.clone(),
            name: hello.name,
            kind: hello.kind,
            device: hello.device,
            samples: hello.samples,
            left: false,
        };
        // Before the welcome, so that it is known again after a restart of the server.
        if self.participants.get(&id).is_none_or(|p| p.saved != saved) {
            self.store.participant(&saved).map_err(Refused::Disk)?;
        }
        let (sender, outbox) = mpsc::channel(OUTBOX);
        let p = self.participants.entry(id).or_insert_with(|| Participant::away(saved.clone(), Metrics::default()));
        if let Some(old) = p.outbox.replace(sender) {
            // Told nothing, the older tab would come back and throw the newer one out, without end. Where it does not
            // listen any more, nothing needs to be said.
            drop(old.try_send(ServerMessage::Refused(taken_over())));
        }
        p.saved = saved;
        (p.progress, p.loss) = ((0, 0), None);
        let counted = hello.download.as_deref().zip(self.downloads.get()).and_then(|(id, claim)| claim(id));
        match counted {
            Some(bytes) => p.account.download(bytes),
            // Counted by nobody here, or forgotten.
            None => p.account.announced(believed(hello.edge_bytes)),
        }
        p.connection += 1;
        let connection = p.connection;
        tracing::info!(federation = self.name, participant = id.0, again = known.is_some(), "joined");
        let (settings, status) = (self.settings.clone(), self.status());
        Ok(Joined { id, token, returning: known.is_some(), settings, status, outbox, connection })
    }

    pub(super) fn tell(&mut self, id: ParticipantId, message: ServerMessage) {
        let Some(p) = self.participants.get_mut(&id) else {
            return;
        };
        let status = matches!(message, ServerMessage::Status(_));
        let Some(outbox) = &p.outbox else {
            return;
        };
        if status && outbox.capacity() < OUTBOX / 2 {
            return; // the other half is for what must be heard
        }
        if outbox.try_send(message).is_err() && !status {
            p.outbox = None; // too slow, or gone: its session ends and it may come back
        }
    }

    pub(super) fn status(&self) -> Status {
        let participants = self.participants.iter().map(|(id, p)| ParticipantStatus {
            id: *id,
            name: p.saved.name.clone(),
            kind: p.saved.kind,
            device: p.saved.device.clone(),
            samples: p.saved.samples,
            connected: self.machine.connected(*id),
            progress: p.progress,
            loss: p.loss,
            updated: self.machine.updated(*id),
            selected: self.machine.selected(*id),
            local: p.local,
            traffic: p.account.total(),
        });
        Status {
            federation: self.name.clone(),
            phase: self.machine.phase(),
            round: self.machine.round(),
            rounds: self.settings.rounds,
            participants: participants.collect(),
            history: self.history.clone(),
            min_participants: self.settings.min_participants,
        }
    }

    /// Show the status in this process, and tell participants, if it is time.
    pub(super) fn show(&mut self) {
        self.changed = false;
        let status = self.status();
        let place = Some((status.phase, status.round));
        if self.told != place || self.is_due() {
            (self.news, self.told, self.told_at) = (false, place, Instant::now());
            let here = self.participants.iter().filter(|(_, p)| p.outbox.is_some());
            for id in here.map(|(id, _)| *id).collect::<Vec<_>>() {
                self.tell(id, ServerMessage::Status(status.clone()));
            }
        }
        self.shown.send_replace(status);
    }

    /// There is something to tell participants, and they have not been told anything for long enough.
    pub(super) fn is_due(&self) -> bool {
        let times = 1 + (self.participants.len() + self.history.len()) / LINES;
        let pause = TELL.saturating_mul(u32::try_from(times).unwrap_or(u32::MAX)).min(TELL_AT_LAST);
        self.news && self.told_at.elapsed() >= pause
    }
}

fn taken_over() -> Fault {
    Fault {
        code: FaultCode::OutOfOrder,
        cause: "another tab or program goes on with this participation".into(),
        remedy: "use that one, or open the invite link in a new tab".into(),
    }
}

fn full(most: usize) -> Fault {
    Fault {
        code: FaultCode::Invalid,
        cause: format!("this federation knows {most} participants already, and takes no more"),
        remedy: "come back with the tab or program that took part before, or ask the operator for another federation"
            .into(),
    }
}

/// What participants of a federation are told that has nothing to judge its rounds by.
pub(super) fn not_judged(cause: &str) -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: format!("the federation's model cannot be judged: {cause}"),
        remedy:
            "the operator should look at the server's device and its held-out set, then restart it; no update is lost"
                .into(),
    }
}

/// What they are told when nobody can compute the LLM's half any more.
pub(super) fn not_computed() -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: "the LLM's thread has ended".into(),
        remedy: "the operator should look at the server's device and start it again; nothing is lost".into(),
    }
}

/// What they are told when the disk fails; a [`SavedParticipant`] or an update that is not on disk was not acknowledged.
pub(super) fn unwritable(cause: &anyhow::Error) -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: format!("{cause:#}"),
        remedy: "the operator should mend that and start the server again; nothing that was acknowledged is lost"
            .into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_spoils_the_sums_by_its_word() {
        let mut account = Account::default();
        for _ in 0..2 {
            account.announced(believed(u64::MAX));
            assert_eq!(account.total().total(), MOST_DOWNLOADED);
        }
        account.download(7);
        assert_eq!(account.total().total(), MOST_DOWNLOADED + 7, "counting goes on");
        assert_eq!(believed(1_000_000), 1_000_000);
    }
}
