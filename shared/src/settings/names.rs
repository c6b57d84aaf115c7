//! What is chosen by a word: strategy, adapters, optimiser, and what goes over the network in which form.

/// A word that names none of the choices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{word}' is no {what}; choose {choices}")]
pub struct UnknownName {
    word: String,
    what: &'static str,
    choices: String,
}

impl UnknownName {
    /// `choices` are all the words that there are.
    pub(crate) fn new(word: &str, what: &'static str, choices: &[&str]) -> Self {
        Self { word: word.to_owned(), what, choices: choices.join(", ") }
    }
}

/// An enum whose variants have one name each, the same in TOML, JSON, flags and messages. Where it is used, [`UnknownName`] must be
/// in scope.
macro_rules! named {
    ($(#[$meta:meta])* $type:ident, $what:tt { $($(#[$doc:meta])* $variant:ident = $name:tt,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ::serde::Serialize, ::serde::Deserialize)]
        pub enum $type {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)+
        }

        impl $type {
            /// All of them.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$variant),+];

            /// Its name in settings, flags and results.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl ::std::fmt::Display for $type {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.pad(self.name())
            }
        }

        impl ::std::str::FromStr for $type {
            type Err = UnknownName;

            fn from_str(word: &str) -> Result<Self, UnknownName> {
                let named = Self::ALL.into_iter().find(|choice| choice.name() == word);
                named.ok_or_else(|| UnknownName::new(word, $what, &Self::ALL.map(Self::name)))
            }
        }
    };
}
pub(crate) use named;

named! {
    /// How participants train and how their updates become the next model; one file each in [`crate::aggregate`].
    Strategy, "strategy" {
        /// Everybody trains alone; nothing is uploaded.
        Local = "local",
        /// One client holds everybody's data: simulation only, the bound that a federation is measured against.
        Centralised = "centralised",
        /// Mean weighted by sample count (McMahan et al. 2017, arXiv 1602.05629).
        FedAvg = "fedavg",
        /// As FedAvg; clients are held near the round's start by `prox_mu` (Li et al. 2020, arXiv 1812.06127).
        FedProx = "fedprox",
        /// Adam on the server, the mean change as its gradient (Reddi et al. 2021, arXiv 2003.00295).
        FedAdam = "fedadam",
        /// Median of each value (Yin et al. 2018, arXiv 1803.01498).
        Median = "median",
        /// Mean of each value without its extremes (Yin et al. 2018, arXiv 1803.01498).
        TrimmedMean = "trimmed-mean",
        /// As FedAvg; each client then tunes an adapter of its own (FedDPA-F, Yang et al. 2024, arXiv 2403.19211).
        FedDpaF = "feddpa-f",
        /// Mean weighted by sample count and diagonal Fisher, measured in a pass of its own (FedNano, arXiv 2506.14824).
        Fisher = "fisher",
        /// As Fisher, from the squared gradients of training (FedNano-EF).
        FisherEf = "fisher-ef",
        /// As Fisher, from Adam's second moment.
        FisherAdam = "fisher-adam",
    }
}

impl Strategy {
    /// Updates carry Fisher values.
    pub fn fisher(self) -> bool {
        matches!(self, Self::Fisher | Self::FisherEf | Self::FisherAdam)
    }

    /// Participants upload adapters.
    pub fn uploads(self) -> bool {
        self != Self::Local
    }

    /// A participant ends with adapters of its own, other than the federation's.
    pub fn personal(self) -> bool {
        matches!(self, Self::Local | Self::FedDpaF)
    }
}

named! {
    /// Which adapters exist and are trained.
    AdapterChoice, "choice of adapters" {
        /// The one at image positions.
        Image = "image",
        /// The one at all other positions.
        Text = "text",
        /// The pair.
        Both = "both",
    }
}

named! {
    /// What turns gradients into steps on the client.
    OptimizerKind, "optimiser" {
        /// Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101).
        AdamW = "adamw",
        /// Stochastic gradient descent with momentum.
        Sgd = "sgd",
    }
}

named! {
    /// What goes over the boundary between client and LLM.
    BoundaryChoice, "mode of the boundary" {
        /// Whichever of the two needs fewer bytes for a participant's data.
        Auto = "auto",
        /// Hidden states up, their gradients down.
        Activations = "activations",
        /// Features once, then the adapters' codes up and the gradients of those down: the same mathematics in fewer numbers.
        LowRank = "low-rank",
    }
}

named! {
    /// How a number is sent.
    Format, "number format" {
        /// 4 bytes: exact.
        F32 = "f32",
        /// 2 bytes, and a power of two for all numbers of a tensor.
        F16 = "f16",
        /// 1 byte, and a scale for each row.
        Int8 = "int8",
    }
}

named! {
    /// To which of its two neighbours a number goes.
    Rounding, "rounding" {
        /// The nearer one: the smallest error of each number.
        Nearest = "nearest",
        /// One by lot, the nearer one more often: errors have no direction, so they do not add up over steps.
        Stochastic = "stochastic",
    }
}

named! {
    /// What a client does while the server computes.
    Overlap, "overlap" {
        /// It waits for each answer.
        Off = "off",
        /// The next part of the same step is computed and sent; the result is the same.
        Parts = "parts",
        /// So is the next step's batch, with adapters that lack this step: faster on slow links, another result.
        Stale = "stale",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_same_in_text_and_json_and_back() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse::<Strategy>(), Ok(strategy));
            assert_eq!(serde_json::to_string(&strategy).unwrap(), format!("\"{strategy}\""));
        }
        assert_eq!("image".parse::<AdapterChoice>(), Ok(AdapterChoice::Image));
        assert_eq!(serde_json::from_str::<OptimizerKind>("\"sgd\"").unwrap(), OptimizerKind::Sgd);
        assert_eq!("low-rank".parse::<BoundaryChoice>(), Ok(BoundaryChoice::LowRank));
        assert_eq!(Format::ALL.map(Format::name), ["f32", "f16", "int8"]);
        assert_eq!([Rounding::Stochastic.name(), Overlap::Stale.name()], ["stochastic", "stale"]);
        let words = "int4".parse::<Format>().unwrap_err().to_string();
        assert_eq!(words, "'int4' is no number format; choose f32, f16, int8");
        let words = "fedvag".parse::<Strategy>().unwrap_err().to_string();
        assert!(words.contains("'fedvag' is no strategy") && words.contains("trimmed-mean"), "{words}");
    }

    #[test]
    fn only_what_is_needed_is_asked_of_clients() {
        let those = |f: fn(Strategy) -> bool| Strategy::ALL.into_iter().filter(|s| f(*s)).collect::<Vec<_>>();
        assert_eq!(those(Strategy::fisher), [Strategy::Fisher, Strategy::FisherEf, Strategy::FisherAdam]);
        assert_eq!(those(Strategy::personal), [Strategy::Local, Strategy::FedDpaF]);
        assert_eq!(those(|s| !s.uploads()), [Strategy::Local]);
    }
}
