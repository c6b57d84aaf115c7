//! Experiments: federations in one process, seeded, and the study that is made of them.
//!
//! | module | what |
//! | --- | --- |
//! | `config` | `[simulation]` and `[federation]` in one file |
//! | `corpus` | samples of the tasks, and how they are dealt to clients |
//! | `stage` | what all runs share: model, features of pictures, exams |
//! | `run` | one federation from its beginning to its end |
//! | `tap` | a connection that remembers the updates |
//! | `merges` | the same updates merged by several rules |
//! | `figures` | what a run gives |
//! | `grid` | which runs the study consists of |
//! | `study` | runs what is missing, writes the results |
//! | `records` | finished runs on disk |
//! | `compare`, `statistics` | differences between runs, and how sure they are |
//! | `tables`, `plots`, `reading` | the results as pages |

mod compare;
pub mod config;
mod corpus;
pub mod figures;
pub mod grid;
pub mod merges;
mod plots;
mod reading;
pub mod records;
pub mod run;
pub mod stage;
pub mod statistics;
pub mod study;
mod tables;
mod tap;
