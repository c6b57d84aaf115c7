//! The set on which merged models are judged.

use crate::llm_host::LlmHandle;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::AdapterState;
use fednano_shared::step::{self, Evaluation};
use std::sync::Arc;

/// Rows of an evaluation batch.
const EVALUATION_BATCH: usize = 16;

/// The set on which merged models are judged.
pub struct HeldOut {
    /// The server's own client part.
    pub edge: Arc<NanoEdge>,
    /// Its encoded samples.
    pub cache: FeatureCache,
    /// Samples used after each round.
    pub rows: Vec<usize>,
    /// Where adapters are applied; without autodiff.
    pub device: burn::tensor::Device,
}

impl HeldOut {
    /// Evaluate adapters (none: the untouched model); blocks, so run it on a blocking thread.
    ///
    /// # Errors
    /// The cause in words.
    pub fn evaluate(
        &self,
        adapter: Option<&AdapterState>,
        rows: &[usize],
        llm: &LlmHandle,
    ) -> Result<Evaluation, String> {
        let adapters = adapter.map(|a| NanoAdapters::from_state(a, &self.device));
        let mut boundary = llm.clone();
        let run = step::evaluate(
            &self.edge,
            adapters.as_ref(),
            &self.cache,
            rows,
            EVALUATION_BATCH,
            &mut boundary,
            &self.device,
        );
        futures_executor::block_on(run).map_err(|e| e.to_string())
    }
}
