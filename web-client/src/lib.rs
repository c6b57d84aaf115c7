//! The participant's tab: `shared`'s client loop in a Web Worker, called by `www/worker.js`. Empty on every other target.
//!
//! | module | what |
//! | --- | --- |
//! | `tab` | what JavaScript sees; the only exports |
//! | `session` | the tab's state: model, data, features, newest adapters |
//! | `socket` | transport and clock over the browser's own |
//! | `keeper` | the work of a round, kept between page loads |
//! | `import` | files of a person to samples |
//! | `gpu` | opening a device, measuring its speed |
//! | `events` | what happens, as JSON |
//! | `check` | a checkpoint against PyTorch's reference values, on the tab's device |

#[cfg(target_arch = "wasm32")]
mod check;
#[cfg(target_arch = "wasm32")]
mod events;
#[cfg(target_arch = "wasm32")]
mod gpu;
#[cfg(target_arch = "wasm32")]
mod import;
#[cfg(target_arch = "wasm32")]
mod keeper;
#[cfg(target_arch = "wasm32")]
mod session;
#[cfg(target_arch = "wasm32")]
mod socket;

/// The exports. Structured values cross as JSON text, errors as `Error` with "cause; remedy".
#[cfg(target_arch = "wasm32")]
pub mod tab {
    use crate::keeper::TabKeeper;
    use crate::session::{Loading, Session};
    use crate::{check, import};
    use fednano_shared::data::picture::Picture;
    use std::collections::BTreeMap;
    use std::fmt::Display;
    use std::rc::Rc;
    use std::time::Duration;
    use wasm_bindgen::prelude::*;
    use wasm_bindgen_futures::JsFuture;

    /// The client's half of the model, loaded piece by piece.
    #[wasm_bindgen]
    pub struct EdgeLoader {
        loading: Loading,
    }

    #[wasm_bindgen]
    impl EdgeLoader {
        /// Begin: the manifest's text, `files` maps the names of its small files to `Uint8Array`, `device` is "cpu" or "webgpu".
        pub async fn open(manifest: String, files: js_sys::Object, device: String) -> Result<EdgeLoader, JsValue> {
            console_error_panic_hook::set_once();
            let loading = Loading::open(&manifest, &contents(&files)?, &device).await.map_err(to_js)?;
            Ok(Self { loading })
        }

        /// Load a piece; in the manifest's order. One that is refused as damaged may be given again.
        #[wasm_bindgen(js_name = addPiece)]
        pub fn add_piece(&mut self, bytes: &[u8]) -> Result<(), JsValue> {
            self.loading.add(bytes).map_err(to_js)
        }

        /// All pieces are in: a participant. The loader is used up.
        pub fn finish(self) -> Result<Tab, JsValue> {
            let session = self.loading.finish().map_err(to_js)?;
            Ok(Tab { session: Rc::new(session) })
        }
    }

    /// One participant.
    #[wasm_bindgen]
    pub struct Tab {
        session: Rc<Session>,
    }

    #[wasm_bindgen]
    impl Tab {
        /// Measured GFLOP/s.
        pub async fn speed(&self) -> Result<f64, JsValue> {
            self.session.speed(now).await.map_err(to_js)
        }

        /// Take a generated shard as the data; a summary comes back.
        #[wasm_bindgen(js_name = loadDemo)]
        pub fn load_demo(&self, theme: &str, seed: u32, pictures: usize, questions: usize) -> Result<String, JsValue> {
            self.session.load_demo(theme, seed, pictures, questions).map_err(to_js)
        }

        /// Keep a picture for [`Tab::set_questions`].
        #[wasm_bindgen(js_name = addPicture)]
        pub fn add_picture(&self, name: &str, width: usize, height: usize, rgba: &[u8]) -> Result<(), JsValue> {
            self.session.add_picture(name, width, height, rgba).map_err(to_js)
        }

        /// Take the added pictures with these questions as the data; a summary comes back.
        #[wasm_bindgen(js_name = setQuestions)]
        pub fn set_questions(&self, file_name: &str, text: &str) -> Result<String, JsValue> {
            self.session.set_questions(file_name, text).map_err(to_js)
        }

        /// Forget data, features and added pictures.
        #[wasm_bindgen(js_name = clearData)]
        pub fn clear_data(&self) {
            self.session.clear_data();
        }

        /// Number of pictures.
        pub fn pictures(&self) -> usize {
            self.session.data().pictures.len()
        }

        /// RGBA bytes of a picture.
        #[wasm_bindgen(js_name = pictureRgba)]
        pub fn picture_rgba(&self, index: usize) -> Result<Vec<u8>, JsValue> {
            self.session.picture(index).map(|p| import::to_rgba(&p)).map_err(to_js)
        }

        /// Width and height of a picture.
        #[wasm_bindgen(js_name = pictureSize)]
        pub fn picture_size(&self, index: usize) -> Result<Vec<u32>, JsValue> {
            self.session.picture(index).map(|p| vec![p.width as u32, p.height as u32]).map_err(to_js)
        }

        /// One sample as JSON.
        pub fn sample(&self, index: usize) -> Result<String, JsValue> {
            self.session.sample(index).map_err(to_js)
        }

        /// Compute the frozen features of the data; `on_progress(done, all)`.
        pub async fn encode(&self, on_progress: js_sys::Function) -> Result<(), JsValue> {
            let report = |done: usize, all: usize| {
                if let Err(e) =
                    on_progress.call2(&JsValue::NULL, &JsValue::from(done as f64), &JsValue::from(all as f64))
                {
                    web_sys::console::error_1(&e);
                }
            };
            self.session.encode(report).await.map_err(to_js)
        }

        /// Take part until the end; `on_event(json)` hears of everything. `keep(bytes)` and `kept()` give promises and hold the
        /// work of a round between page loads; without them a reload begins the round again.
        pub async fn join(
            &self,
            options: String,
            on_event: js_sys::Function,
            keep: Option<js_sys::Function>,
            kept: Option<js_sys::Function>,
        ) -> Result<String, JsValue> {
            let report = |json: &str| {
                if let Err(e) = on_event.call1(&JsValue::NULL, &JsValue::from_str(json)) {
                    web_sys::console::error_1(&e);
                }
            };
            self.session.join(&options, TabKeeper { keep, kept }, report).await.map_err(to_js)
        }

        /// End [`Tab::join`] soon, whatever it waits for.
        pub fn leave(&self) {
            self.session.leave();
        }

        /// Ask about an own picture or (without one) a question alone, with and without adapters; `on_text(which, text)` hears the
        /// answers grow and stops one by returning false.
        pub async fn ask(
            &self,
            url: String,
            federation: String,
            picture: Option<usize>,
            question: String,
            on_text: js_sys::Function,
        ) -> Result<String, JsValue> {
            let picture = picture.map(|index| self.session.picture(index)).transpose().map_err(to_js)?;
            self.session.ask(url, federation, picture.as_ref(), &question, teller(on_text)).await.map_err(to_js)
        }

        /// Ask about any picture, as [`Tab::ask`].
        #[wasm_bindgen(js_name = askPicture)]
        #[allow(clippy::too_many_arguments)] // JavaScript hands them over one by one
        pub async fn ask_picture(
            &self,
            url: String,
            federation: String,
            width: usize,
            height: usize,
            rgba: Vec<u8>,
            question: String,
            on_text: js_sys::Function,
        ) -> Result<String, JsValue> {
            let picture = import::from_rgba(width, height, &rgba).map_err(to_js)?;
            self.session.ask(url, federation, Some(&picture), &question, teller(on_text)).await.map_err(to_js)
        }

        /// Bytes of all questions so far, by direction and kind, as JSON.
        pub fn asked(&self) -> Result<String, JsValue> {
            self.session.asked().map_err(to_js)
        }

        /// The probe's results as JSON.
        pub async fn probe(&self, url: String, federation: String) -> Result<String, JsValue> {
            self.session.probe(url, federation).await.map_err(to_js)
        }
    }

    /// Compare the client's half of a checkpoint with PyTorch's reference values; the report comes back as JSON. `files` maps the
    /// names of the checkpoint's files, of `expected.safetensors` and `meta.json` to `Uint8Array`; `pictures` are
    /// `{width, height, rgba}` in the reference's order, `device` is "cpu" or "webgpu".
    #[wasm_bindgen(js_name = checkReference)]
    pub async fn check_reference(
        files: js_sys::Object,
        pictures: js_sys::Array,
        device: String,
    ) -> Result<String, JsValue> {
        console_error_panic_hook::set_once();
        let pictures = pictures.iter().map(|p| picture(&p)).collect::<Result<Vec<_>, _>>()?;
        check::run(contents(&files)?, pictures, &device).await.map_err(to_js)
    }

    /// An object of `Uint8Array` by name.
    fn contents(files: &js_sys::Object) -> Result<BTreeMap<String, Vec<u8>>, JsValue> {
        let mut contents = BTreeMap::new();
        for key in js_sys::Object::keys(files).iter() {
            let bytes = js_sys::Uint8Array::new(&js_sys::Reflect::get(files, &key)?).to_vec();
            contents.insert(key.as_string().unwrap_or_default(), bytes);
        }
        Ok(contents)
    }

    /// `{width, height, rgba}`
    fn picture(value: &JsValue) -> Result<Picture, JsValue> {
        let get = |key: &str| js_sys::Reflect::get(value, &JsValue::from_str(key));
        let edge = |value: JsValue| value.as_f64().unwrap_or_default() as usize;
        let rgba = js_sys::Uint8Array::new(&get("rgba")?).to_vec();
        import::from_rgba(edge(get("width")?), edge(get("height")?), &rgba).map_err(to_js)
    }

    /// Hands each state of an answer to `on_text(which, text)`; false stops the answer.
    fn teller(on_text: js_sys::Function) -> impl Fn(&str, &str) -> bool {
        move |which, text| match on_text.call2(&JsValue::NULL, &JsValue::from_str(which), &JsValue::from_str(text)) {
            Ok(goes_on) => goes_on.as_bool() != Some(false),
            Err(e) => {
                web_sys::console::error_1(&e);
                true
            }
        }
    }

    /// Every error of the crate leaves through here.
    fn to_js(error: impl Display) -> JsValue {
        js_sys::Error::new(&error.to_string()).into()
    }

    #[wasm_bindgen]
    extern "C" {
        #[wasm_bindgen(js_name = setTimeout)]
        fn set_timeout(callback: &js_sys::Function, milliseconds: f64) -> JsValue;
        #[wasm_bindgen(js_namespace = performance, js_name = now)]
        fn now() -> f64;
    }

    /// Since the program started; never goes back.
    pub(crate) fn monotonic() -> Duration {
        Duration::from_micros((now() * 1000.0) as u64) // from milliseconds
    }

    /// Ready after `time`.
    pub(crate) fn timer(time: Duration) -> JsFuture {
        let milliseconds = time.as_millis() as f64;
        let promise = js_sys::Promise::new(&mut |resolve, _reject| {
            set_timeout(&resolve, milliseconds);
        });
        JsFuture::from(promise)
    }
}
