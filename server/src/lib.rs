//! FedNano's native side.
pub mod commands;
pub mod datasets;
pub mod device;
pub mod pretrain;
