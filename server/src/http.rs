//! Routes: the page, edge weights, status, the WebSocket. The only file that knows axum.

use crate::session::{self, Shared, SocketFault};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use fednano_shared::wire;
use futures_util::{SinkExt, StreamExt};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::task::TaskTracker;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, NotForContentType, Predicate};
use tower_http::services::ServeDir;
use tower_http::set_header::SetResponseHeaderLayer;

/// A file of the client part.
pub struct EdgeFile {
    bytes: Vec<u8>,
    sha256: String,
}

/// What the routes need.
pub struct Site {
    /// Sessions.
    pub shared: Shared,
    /// The client part by file name.
    pub edge: BTreeMap<String, EdgeFile>,
    /// Name of the model.
    pub model: String,
    /// Folder of the page.
    pub www: PathBuf,
    /// Sessions under way: axum does not wait for upgraded connections.
    pub sessions: TaskTracker,
}

impl EdgeFile {
    /// Hash a file.
    pub fn new(bytes: Vec<u8>) -> Self {
        let sha256 = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        Self { bytes, sha256 }
    }

    /// SHA-256 in hex.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// Serve until `shutdown`. Requests under way are finished; sessions are the caller's to wait for.
///
/// # Errors
/// The listener's.
pub async fn serve(
    listener: tokio::net::TcpListener,
    site: Arc<Site>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(site)).with_graceful_shutdown(shutdown).await
}

fn router(site: Arc<Site>) -> Router {
    // The wasm is compressed once, by the build.
    let page = ServeDir::new(&site.www).append_index_html_on_directories(true).precompressed_gzip();
    // Weights in f16 hardly shrink.
    let worth_compressing = DefaultPredicate::new()
        .and(NotForContentType::const_new("application/octet-stream"))
        .and(NotForContentType::const_new("application/wasm"));
    let header = |name, value| SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value));
    Router::new()
        .route("/ws", get(websocket))
        .route("/api/federations", get(federations))
        .route("/api/federations/{name}", get(federation))
        .route("/edge/manifest.json", get(manifest))
        .route("/edge/{name}", get(edge))
        .fallback_service(page)
        .layer(CompressionLayer::new().compress_when(worth_compressing))
        // The page changes with the server; only edge weights are immutable.
        .layer(header(header::CACHE_CONTROL, "no-cache"))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        // Cross-origin isolation: precise timers and, later, threads.
        .layer(header(header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"))
        .layer(header(header::HeaderName::from_static("cross-origin-embedder-policy"), "require-corp"))
        .with_state(site)
}

async fn federations(State(site): State<Arc<Site>>) -> Response {
    Json(site.shared.federations.values().map(|f| f.status()).collect::<Vec<_>>()).into_response()
}

async fn federation(State(site): State<Arc<Site>>, Path(name): Path<String>) -> Response {
    match site.shared.federations.get(&name) {
        Some(f) => Json(f.status()).into_response(),
        None => {
            let known: Vec<_> = site.shared.federations.keys().collect();
            let body = serde_json::json!({"code": "unknown_federation", "cause": format!("there is no federation '{name}' here"),
                "remedy": format!("check the invite link; this server has: {known:?}")});
            (StatusCode::NOT_FOUND, Json(body)).into_response()
        }
    }
}

async fn manifest(State(site): State<Arc<Site>>) -> Response {
    let files: Vec<_> = site
        .edge
        .iter()
        .map(|(name, f)| serde_json::json!({"name": name, "bytes": f.bytes.len(), "sha256": f.sha256}))
        .collect();
    Json(serde_json::json!({"model": site.model, "files": files})).into_response()
}

async fn edge(State(site): State<Arc<Site>>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    let Some(file) = site.edge.get(&name) else {
        return (StatusCode::NOT_FOUND, format!("there is no edge file '{name}'; see /edge/manifest.json"))
            .into_response();
    };
    let tag = format!("\"{}\"", file.sha256);
    if headers.get(header::IF_NONE_MATCH).is_some_and(|t| t.as_bytes() == tag.as_bytes()) {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    let kind = if name.ends_with(".json") { "application/json" } else { "application/octet-stream" };
    // A client that asks with the hash in the query may keep the file for good.
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::ETAG, tag),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable".to_owned()),
    ];
    (headers, file.bytes.clone()).into_response()
}

async fn websocket(State(site): State<Arc<Site>>, upgrade: WebSocketUpgrade) -> Response {
    let site = site.clone();
    upgrade
        .max_message_size(wire::MAX_FRAME)
        .max_frame_size(wire::MAX_FRAME)
        .on_upgrade(move |socket| {
            let tracked = site.sessions.clone();
            let shared = site.shared.clone();
            async move { drop(tracked.spawn(session::run(frames(socket), shared)).await) }
        })
        .into_response()
}

/// A WebSocket as a stream and sink of whole frames.
fn frames(
    socket: WebSocket,
) -> impl futures_util::Stream<Item = Result<Vec<u8>, SocketFault>>
+ futures_util::Sink<Vec<u8>, Error = axum::Error>
+ Unpin
+ Send {
    let incoming = |message: Result<Message, axum::Error>| async move {
        match message {
            Ok(Message::Binary(bytes)) => Some(Ok(bytes.to_vec())),
            Ok(Message::Text(_)) => Some(Err(SocketFault::NotBinary)),
            Ok(Message::Pong(_)) => Some(Err(SocketFault::Alive)),
            Ok(Message::Ping(_)) => None,
            Ok(Message::Close(_)) => Some(Err(SocketFault::Closed)),
            Err(e) if e.to_string().contains("too l") => Some(Err(SocketFault::TooLarge)),
            Err(_) => Some(Err(SocketFault::Closed)),
        }
    };
    Box::pin(socket.filter_map(incoming).with(|frame: Vec<u8>| async move {
        // An empty frame asks for a sign of life.
        let message = if frame.is_empty() { Message::Ping(frame.into()) } else { Message::Binary(frame.into()) };
        Ok::<_, axum::Error>(message)
    }))
}
