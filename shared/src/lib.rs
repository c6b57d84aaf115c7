//! FedNano's core, the same code in browser tab, native client, simulator and server.
//!
//! | module | what |
//! | --- | --- |
//! | `step` | the training step, client's and server's half, in order of execution: start here |
//! | `optimizer` | AdamW and SGD on the adapters, with a memory that can be kept |
//! | `edge` | NanoEdge: the frozen part that a client holds |
//! | `bundle` | the client's half of a model as pieces known by their hash: f16, 8 or 4 bits |
//! | `wire` | the whole protocol: messages, what is agreed, numbers as bytes |
//! | `client` | a participant's round loop, generic over transport, clock and keeper |
//! | `ask` | questions to the model, without taking part in rounds |
//! | `generate` | decoding token by token, with a cache on the server |
//! | `aggregate` | merging: one validation, one file for each strategy |
//! | `settings` | what the participants of a federation agree on |
//! | `probe` | one fixed step with all its results, to compare devices and places |
//! | `check` | a checkpoint against reference values of PyTorch: limits, rows, the client's half |
//! | `boundary` | what crosses between client and LLM: requests and replies, plain data with its checks |
//! | `plain` | blobs and adapters: plain data with its checks |
//! | `ledger` | every byte on the network, by kind, direction and round |
//! | `config` | model settings, validated once |
//! | `model` | CLIP, projector, Llama, adapters, checkpoints |
//! | `data` | samples, pictures, text, generated scenes |

pub mod aggregate;
pub mod ask;
pub mod boundary;
pub mod bundle;
pub mod check;
pub mod client;
pub mod config;
pub mod data;
pub mod edge;
pub mod generate;
pub mod ledger;
pub mod model;
pub mod optimizer;
pub mod plain;
pub mod probe;
pub mod settings;
pub mod step;
pub mod wire;
