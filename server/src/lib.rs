//! FedNano's native side. Imports go downward only: commands > app > http > session > coordinator > llm_host, store.
//!
//! | module | what |
//! | --- | --- |
//! | `commands` | one thin file for each subcommand |
//! | `app` | the server as one value: load, listen, shut down |
//! | `http` | routes; the only file that knows axum |
//! | `session` | one connection: handshake, requests, messages |
//! | `coordinator` | a federation's owner task, and its rounds as a pure state machine |
//! | `held_out` | evaluation of merged models |
//! | `llm_host` | the thread that owns the LLM's device; batches across clients |
//! | `store` | what survives on disk |
//! | `native` | a participant over a real socket |
//! | `datasets` | question files and picture folders to samples |
//! | `device` | CPU, wgpu or CUDA, chosen at run time |
//! | `pretrain` | how the demo model is made |

pub mod app;
pub mod commands;
pub mod coordinator;
pub mod datasets;
pub mod device;
pub mod held_out;
pub mod http;
pub mod llm_host;
pub mod native;
pub mod pretrain;
pub mod session;
pub mod store;
