//! FedNano's native side. Imports go downward only: commands > app > http > session > coordinator > llm_host, store.
//!
//! | module | what |
//! | --- | --- |
//! | `commands` | one thin file for each subcommand |
//! | `app` | the server as one value: load, listen, shut down |
//! | `http` | routes; the only file that knows axum |
//! | `session` | one connection: handshake, requests, pictures, messages |
//! | `coordinator` | a federation's owner task, and its rounds as a pure state machine |
//! | `held_out` | evaluation of merged models |
//! | `llm_host` | the thread that owns the LLM's device; batches across clients |
//! | `store` | what survives on disk |
//! | `text_table` | the model's token table, as clients hold it |
//! | `native` | a participant over a real socket |
//! | `experiment` | simulated federations, and the study made of them |
//! | `datasets` | question files, ScienceQA and IconQA with their pictures to samples |
//! | `device` | CPU, wgpu or CUDA, chosen at run time |
//! | `check` | a checkpoint against reference values of PyTorch, tensor by tensor |
//! | `edge_bundle` | the client's half of the model, prepared once as files |
//! | `edge_download` | a native client fetches it, resumed and kept |
//! | `fetch` | models from the Hugging Face hub, in its cache |
//! | `account` | what a federation costs, from a model's shape |
//! | `wire_bench` | bytes, accuracy and times of all ways over the boundary, measured |
//! | `tracing_setup` | the log, and a timeline of every step |
//! | `presets` | shapes of published models and smaller ones, and their tensors |
//! | `random_model` | checkpoints of a real shape with random weights |
//! | `pretrain` | how the demo model is made |

pub mod account;
pub mod app;
pub mod check;
pub mod commands;
pub mod coordinator;
pub mod datasets;
pub mod device;
pub mod edge_bundle;
pub mod edge_download;
pub mod experiment;
pub mod fetch;
pub mod held_out;
pub mod http;
pub mod llm_host;
pub mod native;
pub mod presets;
pub mod pretrain;
pub mod random_model;
pub mod session;
pub mod store;
pub mod text_table;
pub mod tracing_setup;
pub mod wire_bench;
