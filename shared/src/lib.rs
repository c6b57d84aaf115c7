//! FedNano's core, the same code in browser tab, native client, simulator and server.
//!
//! | module | what |
//! | --- | --- |
//! | `step` | the training step, client's and server's half, in order of execution: start here |
//! | `edge` | NanoEdge: the frozen part that a client holds |
//! | `plain` | blobs, adapters, boundary requests: plain data with its checks |
//! | `config` | model settings, validated once |
//! | `model` | CLIP, projector, Llama, adapters, checkpoints |
//! | `data` | samples, pictures, text, generated scenes |

pub mod config;
pub mod data;
pub mod edge;
pub mod model;
pub mod plain;
pub mod step;
