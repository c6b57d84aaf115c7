//! The work of the round under way, kept between page loads by JavaScript (`www/work.js`).

use fednano_shared::client::Keeper;
use js_sys::{Function, Promise, Uint8Array};
use wasm_bindgen::{JsCast, JsValue};
use wasm_bindgen_futures::JsFuture;

/// Hands snapshots to JavaScript, where there is something that keeps them.
pub struct TabKeeper {
    /// `keep(bytes)`: a promise of nothing.
    pub keep: Option<Function>,
    /// `kept()`: a promise of bytes or null.
    pub kept: Option<Function>,
}

impl Keeper for TabKeeper {
    async fn keep(&mut self, snapshot: &[u8]) {
        if let Some(keep) = &self.keep {
            settle(keep.call1(&JsValue::NULL, &JsValue::from(Uint8Array::from(snapshot)))).await;
        }
    }

    async fn kept(&mut self) -> Option<Vec<u8>> {
        let kept = settle(self.kept.as_ref()?.call0(&JsValue::NULL)).await?;
        Some(kept.dyn_into::<Uint8Array>().ok()?.to_vec())
    }

    fn keeps(&self) -> bool {
        self.keep.is_some()
    }
}

/// What a call's promise brings. `www/work.js` tells the person of faults of the storage; others are mistakes of the program.
async fn settle(called: Result<JsValue, JsValue>) -> Option<JsValue> {
    let settled = match called.and_then(|promise| promise.dyn_into::<Promise>()) {
        Ok(promise) => JsFuture::from(promise).await,
        Err(e) => Err(e),
    };
    settled.inspect_err(web_sys::console::error_1).ok()
}
