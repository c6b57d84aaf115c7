//! How nano-llava, the demo model, comes to be: from a seed, on generated scenes alone.
//!
//! | file | what |
//! | --- | --- |
//! | `tokenizer.rs` | byte-level BPE in which every word of the corpus is one token |
//! | `corpus.rs` | scenes and questions, packed behind one picture prefix |
//! | `trainee.rs` | the model with a training-only head, its start values |
//! | `objectives.rs` | the losses: answers, dense picture labels, alignment of picture and words |
//! | `run.rs` | the stages in order, checkpoints, resume |
//! | `card.rs` | held-out accuracy of the finished files and the model card |

pub mod card;
pub mod corpus;
pub mod objectives;
pub mod run;
pub mod tokenizer;
pub mod trainee;
