//! Routes: the page, edge weights, status, figures, the WebSocket. The only file that knows axum.
//!
//! | module | what |
//! | --- | --- |
//! | `downloads` | whose download of edge weights has come how far |
//! | `metrics` | figures for Prometheus |

mod downloads;
mod metrics;

use crate::edge_bundle::Bundle;
use crate::session::{self, Shared, SignsOfLife, SocketFault};
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Request, State};
use axum::http::{Extensions, HeaderMap, HeaderValue, StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json, Router};
use downloads::Downloads;
use fednano_shared::bundle::sha256_hex;
use fednano_shared::wire;
use futures_util::{SinkExt, StreamExt, TryStreamExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio_util::task::TaskTracker;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{DefaultPredicate, NotForContentType, Predicate};
use tower_http::services::{ServeDir, ServeFile};
use tower_http::set_header::SetResponseHeaderLayer;

/// What the routes need.
pub struct Site {
    /// Sessions.
    pub shared: Shared,
    /// The client's half of the model.
    pub bundle: Bundle,
    /// Folder of the page.
    pub www: PathBuf,
    /// Sessions under way: axum does not wait for upgraded connections.
    pub sessions: TaskTracker,
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
    serve_with(listener, site, SignsOfLife::default(), shutdown).await
}

/// The same with another patience with silent peers.
///
/// # Errors
/// The listener's.
pub async fn serve_with(
    listener: tokio::net::TcpListener,
    site: Arc<Site>,
    signs: SignsOfLife,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let downloads = Arc::new(Downloads::default());
    for federation in site.shared.federations.values() {
        let downloads = downloads.clone();
        federation.count_downloads(Arc::new(move |id: &str| downloads.claim(id)));
    }
    axum::serve(listener, router(site, downloads, signs)).with_graceful_shutdown(shutdown).await
}

fn router(site: Arc<Site>, downloads: Arc<Downloads>, signs: SignsOfLife) -> Router {
    // The wasm is compressed once, by the build.
    let page = ServeDir::new(&site.www).append_index_html_on_directories(true).precompressed_gzip();
    // Weights hardly shrink, in f16 as well as quantised.
    let worth_compressing = DefaultPredicate::new()
        .and(NotForContentType::const_new("application/octet-stream"))
        .and(NotForContentType::const_new("application/wasm"))
        .and(not_counted);
    let header = |name, value| SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value));
    Router::new()
        .route("/ws", get(move |state: State<Arc<Site>>, upgrade: WebSocketUpgrade| websocket(state, upgrade, signs)))
        .route("/api/federations", get(federations))
        .route("/api/federations/{name}", get(federation))
        .route("/api/federations/{name}/ledger", get(ledger))
        .route("/metrics", get(figures))
        .route("/edge/manifest.json", get(manifest))
        .route("/edge/pieces/{sha256}", get(piece))
        .route("/edge/files/{sha256}", get(file))
        .fallback_service(page)
        .layer(CompressionLayer::new().compress_when(worth_compressing))
        // The page and the manifest change with the server; what is named by its hash is immutable.
        .layer(header(header::CACHE_CONTROL, "no-cache"))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        // Cross-origin isolation: precise timers and, later, threads.
        .layer(header(header::HeaderName::from_static("cross-origin-opener-policy"), "same-origin"))
        .layer(header(header::HeaderName::from_static("cross-origin-embedder-policy"), "require-corp"))
        .layer(Extension(downloads))
        .with_state(site)
}

async fn federations(State(site): State<Arc<Site>>) -> Response {
    Json(site.shared.federations.values().map(|f| f.status()).collect::<Vec<_>>()).into_response()
}

async fn federation(State(site): State<Arc<Site>>, Path(name): Path<String>) -> Response {
    match site.shared.federations.get(&name) {
        Some(f) => Json(f.status()).into_response(),
        None => unknown(&site, &name),
    }
}

/// Bytes by participant, direction and kind, and of the newest rounds; with `?rounds=true` each participant's by round too, which is
/// much where they are many.
async fn ledger(State(site): State<Arc<Site>>, Path(name): Path<String>, uri: Uri) -> Response {
    let Some(f) = site.shared.federations.get(&name) else { return unknown(&site, &name) };
    let rounds = uri.query().is_some_and(|query| query.split('&').any(|pair| pair == "rounds=true"));
    match f.recent_ledger(rounds).await {
        Some(ledger) => Json(ledger).into_response(),
        None => {
            let body = serde_json::json!({"code": "server", "cause": format!("the federation '{name}' has ended"),
                "remedy": "ask the operator to start the server again; what was counted is kept"});
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
    }
}

fn unknown(site: &Site, name: &str) -> Response {
    let known: Vec<_> = site.shared.federations.keys().collect();
    let body = serde_json::json!({"code": "unknown_federation", "cause": format!("there is no federation '{name}' here"),
        "remedy": format!("check the invite link; this server has: {known:?}")});
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

/// For Prometheus. A federation that has ended is left out.
async fn figures(State(site): State<Arc<Site>>) -> Response {
    let mut all = Vec::new();
    for f in site.shared.federations.values() {
        if let Some(sums) = f.sums().await {
            all.push(metrics::Figures { status: f.status(), total: sums.total, rounds: sums.rounds });
        }
    }
    match metrics::text(&all) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(e) => {
            let words = format!("the figures cannot be written: {e}; tell the developers of this program");
            (StatusCode::INTERNAL_SERVER_ERROR, words).into_response()
        }
    }
}

async fn manifest(
    State(site): State<Arc<Site>>,
    Extension(downloads): Extension<Arc<Downloads>>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let tag = format!("\"{}\"", sha256_hex(&site.bundle.manifest_json));
    if has_already(&headers, &tag) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response();
    }
    let count = download_id(&uri, &headers).and_then(|id| downloads.of(id));
    let headers = [(header::CONTENT_TYPE, "application/json".to_owned()), (header::ETAG, tag)];
    counted((headers, site.bundle.manifest_json.clone()).into_response(), count)
}

async fn piece(
    State(site): State<Arc<Site>>,
    Extension(downloads): Extension<Arc<Downloads>>,
    Path(sha256): Path<String>,
    request: Request,
) -> Response {
    let known = site.bundle.manifest.pieces.iter().any(|p| p.sha256 == sha256);
    content(&site, &downloads, known, &sha256, "application/octet-stream", request).await
}

async fn file(
    State(site): State<Arc<Site>>,
    Extension(downloads): Extension<Arc<Downloads>>,
    Path(sha256): Path<String>,
    request: Request,
) -> Response {
    let known = site.bundle.manifest.files.iter().any(|f| f.sha256 == sha256);
    content(&site, &downloads, known, &sha256, "application/json", request).await
}

/// The id of a download: `?download=ID`, or the header `x-download`. An address with an id is of no use to a browser's cache.
fn download_id<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let named = uri.query().and_then(|query| query.split('&').find_map(|pair| pair.strip_prefix("download=")));
    named.or_else(|| headers.get("x-download").and_then(|value| value.to_str().ok()))
}

/// On a response whose bytes are counted: the client must see as many as the server.
#[derive(Debug, Clone, Copy)]
struct Counted;

fn not_counted(_: StatusCode, _: Version, _: &HeaderMap, extensions: &Extensions) -> bool {
    extensions.get::<Counted>().is_none()
}

/// The same response; the bytes of its body are counted as they go to the socket.
fn counted(mut response: Response, count: Option<Arc<AtomicU64>>) -> Response {
    let Some(count) = count else { return response };
    // A stream does not know its length.
    if let Some(length) = response.body().size_hint().exact() {
        response.headers_mut().entry(header::CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
    response.extensions_mut().insert(Counted);
    response.map(|body| {
        let add = move |bytes: &Bytes| {
            count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        };
        Body::from_stream(body.into_data_stream().inspect_ok(add))
    })
}

/// Bytes named by their hash: whoever has them may keep them for good. Ranges and streaming are tower-http's.
async fn content(
    site: &Site,
    downloads: &Downloads,
    known: bool,
    sha256: &str,
    kind: &'static str,
    mut request: Request,
) -> Response {
    if !known {
        let words = format!("there is no '{sha256}' here, perhaps the model has changed; see /edge/manifest.json");
        return (StatusCode::NOT_FOUND, words).into_response();
    }
    let tag = format!("\"{sha256}\"");
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::ETAG, tag.clone()),
        (header::CACHE_CONTROL, "public, max-age=31536000, immutable".to_owned()),
    ];
    if has_already(request.headers(), &tag) {
        return (StatusCode::NOT_MODIFIED, headers).into_response();
    }
    let count = download_id(request.uri(), request.headers()).and_then(|id| downloads.of(id));
    // Whoever holds the beginning of something else gets all of this.
    if request.headers().get(header::IF_RANGE).is_some_and(|t| t.as_bytes() != tag.as_bytes()) {
        request.headers_mut().remove(header::RANGE);
    }
    // The hash has said more than times could.
    request.headers_mut().remove(header::IF_MODIFIED_SINCE);
    request.headers_mut().remove(header::IF_UNMODIFIED_SINCE);
    match ServeFile::new(site.bundle.folder.join(sha256)).try_call(request).await {
        Ok(found) if found.status().is_success() => counted((headers, found).into_response(), count),
        Ok(other) => other.into_response(),
        Err(e) => {
            let words = format!("{sha256} cannot be read: {e}; ask the operator to start the server again");
            (StatusCode::INTERNAL_SERVER_ERROR, words).into_response()
        }
    }
}

/// Whether what the client holds is up to date.
fn has_already(headers: &HeaderMap, tag: &str) -> bool {
    let tags = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(','));
    tags.map(str::trim).any(|t| t == "*" || t.strip_prefix("W/").unwrap_or(t) == tag)
}

async fn websocket(State(site): State<Arc<Site>>, upgrade: WebSocketUpgrade, signs: SignsOfLife) -> Response {
    let site = site.clone();
    upgrade
        .max_message_size(wire::MAX_FRAME)
        .max_frame_size(wire::MAX_FRAME)
        .on_upgrade(move |socket| {
            let tracked = site.sessions.clone();
            let shared = site.shared.clone();
            async move { drop(tracked.spawn(session::run_with(frames(socket), shared, signs)).await) }
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
