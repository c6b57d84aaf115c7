//! From files and generators to tokens and pixels.
//!
//! | module | what |
//! | --- | --- |
//! | `dataset` | samples, subsets, baselines |
//! | `formats` | readers for LLaVA JSON, CSV, easy-VQA |
//! | `split` | Dirichlet split over clients |
//! | `picture` | resize, crop, normalise |
//! | `text` | prompt and tokenizer |
//! | `scene` | the generator of the demo corpus and the demo shards |

pub mod dataset;
pub mod formats;
pub mod picture;
mod resample;
pub mod scene;
pub mod split;
pub mod text;
