#!/usr/bin/env bash
# Builds the browser client into www/pkg, or lints it.
#
#   bash .ci/build-web.sh           build; does nothing when no input has changed
#   bash .ci/build-web.sh clippy    clippy, as the build compiles
#
# www/pkg is built aside and swapped in when whole; www/pkg/.stamp is the hash of what it was built from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS="${FEDNANO_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/fednano/tools}"
# Its own folder: the wasm compiler may be another one than the native, and they would undo each other's work.
TARGET="${CARGO_TARGET_DIR:-target}/wasm-web"
WASM_FLAGS='--cfg getrandom_backend="wasm_js" -C target-feature=+simd128'

say() { printf 'web: %s\n' "$*"; }

# wasm_cargo SUBCOMMAND ARGS... -- in the environment that setup.sh chose
wasm_cargo() (
    # Either would take the place of the flags below.
    unset RUSTFLAGS CARGO_ENCODED_RUSTFLAGS
    export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS="$WASM_FLAGS"
    build_std=
    if [ "$WASM_TOOLCHAIN" = debian ]; then
        # A stable compiler without a ready-made std for wasm: it builds std itself, which -Z flags need BOOTSTRAP for.
        export PATH="/usr/bin:$PATH" RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1
        export CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER="$WASM_LINKER"
        build_std=-Zbuild-std=std,panic_abort
    fi
    subcommand="$1"
    shift
    # shellcheck disable=SC2086 # build_std may be empty
    cargo "$subcommand" --release -p fednano-web --lib --target wasm32-unknown-unknown --target-dir "$TARGET" \
        $build_std "$@" </dev/null
)

sha256() { if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi; }

inputs_hash() {
    {
        cat "$TOOLS/wasm.env"
        find web-client shared Cargo.toml Cargo.lock .ci/build-web.sh -type f ! -name '.*' ! -path '*/target/*' -print0 |
            LC_ALL=C sort -z | while IFS= read -r -d '' file; do
            printf '%s\n' "$file"
            sha256 <"$file"
        done
    } | sha256 | cut -d ' ' -f 1
}

megabytes() { awk -v bytes="$(wc -c <"$1")" 'BEGIN { printf "%.1f MB", bytes / 1e6 }'; }

at_most() {
    if command -v timeout >/dev/null; then timeout "$@"; else
        shift
        "$@"
    fi
}

optimise() { # FILE, in place
    if [ -z "$WASM_OPT" ]; then
        say "no wasm-opt: $(megabytes "$1"), unoptimised"
        return 0
    fi
    say "optimising with wasm-opt ($(megabytes "$1") before; a few minutes)"
    # The features that rustc's wasm uses by default, and SIMD.
    if at_most 1200 "$WASM_OPT" -O3 --strip-debug --strip-producers --enable-simd --enable-bulk-memory \
        --enable-nontrapping-float-to-int --enable-sign-ext --enable-mutable-globals --enable-reference-types \
        --enable-multivalue "$1" -o "$1.opt"; then
        mv "$1.opt" "$1"
        say "optimised to $(megabytes "$1")"
    else
        rm -f "$1.opt"
        say "wasm-opt failed: keeping the unoptimised file, which works the same"
    fi
}

if [ "${1:-build}" = clippy ]; then
    bash .ci/setup.sh web lint
    # shellcheck source=/dev/null
    . "$TOOLS/wasm.env"
    wasm_cargo clippy -- -D warnings
    exit
fi

bash .ci/setup.sh web
# shellcheck source=/dev/null
. "$TOOLS/wasm.env"

hash="$(inputs_hash)"
if [ "$hash" = "$(cat www/pkg/.stamp 2>/dev/null)" ]; then
    say "www/pkg is up to date"
    exit
fi

mkdir -p .tools
WORK="$(mktemp -d .tools/web.XXXXXX)"
trap 'rm -rf "$WORK"; rmdir .tools 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Another clone may have built the same inputs: wasm-opt takes minutes.
KEPT="$TOOLS/page"
if [ "$hash" = "$(cat "$KEPT/.stamp" 2>/dev/null)" ]; then
    say "taking the page that was built from the same sources before"
    cp -R "$KEPT" "$WORK/pkg"
else
    say "compiling the browser client to wasm (the first time takes minutes)"
    wasm_cargo build
    "$WASM_BINDGEN" --target web --no-typescript --remove-name-section --remove-producers-section \
        --out-dir "$WORK/pkg" "$TARGET/wasm32-unknown-unknown/release/fednano_web.wasm"
    optimise "$WORK/pkg/fednano_web_bg.wasm"
    # Served as it is to browsers that take gzip, instead of being compressed for each of them.
    gzip -9 -k "$WORK/pkg/fednano_web_bg.wasm"
    cp -R "$UPLOT" "$WORK/pkg/uplot"
    # An input edited during the build belongs to the next one: this stamp is of what was there before.
    printf '%s\n' "$hash" >"$WORK/pkg/.stamp"
    cp -R "$WORK/pkg" "$WORK/kept"
    rm -rf "$KEPT"
    mv "$WORK/kept" "$KEPT"
fi
[ ! -e www/pkg ] || mv www/pkg "$WORK/old"
mv "$WORK/pkg" www/pkg
say "www/pkg is ready"
