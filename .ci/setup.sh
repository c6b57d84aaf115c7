#!/usr/bin/env bash
# Installs what FedNano needs beyond Rust (from rustup) and a C compiler, and only what is missing.
#
#   bash .ci/setup.sh [web] [browser] [vulkan] [lint]    no argument: web browser vulkan
#   bash .ci/setup.sh clean                              removes what it put into the tools folder and www/pkg
#
# Every part is looked at directly on each run (a fraction of a second when nothing is missing), is fetched or built in
# a temporary folder, and is moved into place when whole. Clones share one tools folder: $FEDNANO_TOOLS, else
# ~/.cache/fednano/tools. System packages are installed through apt where there is one; elsewhere a message names them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TOOLS="${FEDNANO_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/fednano/tools}"
UPLOT=1.6.32          # the page's charts
BINARYEN=132.0.0      # npm's wasm-opt
BINARYEN_OLDEST=116   # Debian's 108 cannot read what today's rustc and wasm-bindgen write

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

# macOS has no timeout.
at_most() {
    if have timeout; then timeout "$@"; else
        shift
        "$@"
    fi
}

SCRATCH=
trap '[ -z "$SCRATCH" ] || rm -rf "$SCRATCH"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Before the first change: one set-up at a time over all clones, and a temporary folder beside its final place.
# Commands that may leave a daemon behind get 9>&-, so that it does not hold the lock for ever.
begin() {
    [ -z "$SCRATCH" ] || return 0
    mkdir -p "$TOOLS"
    if have flock; then
        exec 9>"$TOOLS/.lock"
        flock -n 9 || {
            say "waiting for another set-up in $TOOLS"
            flock 9
        }
        rm -rf "$TOOLS"/tmp.* # left by a set-up that was killed outright
    fi
    SCRATCH="$(mktemp -d "$TOOLS/tmp.XXXXXX")"
}

# place FOLDER NAME: the last step of each installation.
place() {
    rm -rf "${TOOLS:?}/$2"
    mv "$1" "$TOOLS/$2"
}

# ---- system packages ----

SUDO=
APT_UPDATED=

apt_ready() {
    have apt-get || return 1
    if [ "$(id -u)" != 0 ]; then
        have sudo || return 1
        # Without a terminal nobody can type a password.
        if [ -t 0 ]; then SUDO="sudo"; else SUDO="sudo -n"; fi
        $SUDO true || return 1
    fi
}

apt_get() {
    # shellcheck disable=SC2086 # SUDO is empty or several words
    $SUDO env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" \
        </dev/null >/dev/null 9>&-
}

apt_update() {
    apt_ready || return 1
    [ -z "$APT_UPDATED" ] || return 0
    say "reading the system's package lists"
    apt_get update || say "apt-get update failed; going on with the lists at hand"
    APT_UPDATED=1
}

# apt_install WHY PACKAGE... Fails when there is no apt or no right to use it. Never removes a package to make room.
apt_install() {
    local why="$1"
    shift
    begin
    apt_update || return 1
    say "installing $* ($why)"
    apt_get install -y --no-install-recommends --no-remove "$@"
}

# missing WHAT WHY DEBIAN_PACKAGES ELSEWHERE
missing() {
    fail "$1 is missing; it is needed for $2." \
        "  Debian, Ubuntu: sudo apt-get install --no-install-recommends $3" \
        "  elsewhere:      $4" \
        "Then run the same command again."
}

# ---- web: what builds www/pkg ----

rust_lld() {
    local host lld
    host="$(rustc -vV | sed -n 's/^host: //p')"
    for lld in "$(rustc --print sysroot)/lib/rustlib/$host/bin/rust-lld" "$(command -v wasm-ld || true)"; do
        if [ -n "$lld" ] && [ -x "$lld" ]; then
            printf '%s\n' "$lld"
            return 0
        fi
    done
    return 1
}

rust_has_wasm() { [ -n "$(find "$(rustc --print sysroot)/lib/rustlib/wasm32-unknown-unknown/lib" -name 'libstd-*.rlib' 2>/dev/null)" ]; }

# Debian's newer compiler, and the standard library's source to build for wasm with it.
debian_has_wasm() {
    local oldest
    oldest="$(sed -nE 's/^rust-version = "([0-9.]+)"$/\1/p' Cargo.toml)"
    [ -x /usr/bin/rustc ] && [ -x /usr/bin/cargo ] && [ -f /usr/lib/rustlib/src/rust/library/std/Cargo.toml ] &&
        version_at_least "$(/usr/bin/rustc --version | cut -d ' ' -f 2)" "$oldest" && rust_lld >/dev/null
}

# Sets WASM_TOOLCHAIN and WASM_LINKER (empty: the compiler's own).
wasm_toolchain() {
    have rustc && have cargo || fail "Rust is missing: install it with rustup, then run the same command again."
    choose_wasm_toolchain && return 0

    begin
    if have rustup; then
        say "adding rustup's wasm32-unknown-unknown target (the browser client is compiled to wasm)"
        at_most 60 rustup target add wasm32-unknown-unknown </dev/null 9>&- ||
            say "rustup could not add it; trying the system's packages instead"
        choose_wasm_toolchain && return 0
    fi
    local lld=
    rust_lld >/dev/null || lld=lld
    # shellcheck disable=SC2086 # lld may be empty
    apt_install "a compiler that can build the standard library for wasm" rustc-web cargo-web rust-web-src $lld || true
    choose_wasm_toolchain || missing "Rust's wasm32-unknown-unknown target" "the browser client" \
        "rustc-web cargo-web rust-web-src lld" \
        "rustup target add wasm32-unknown-unknown (or your distribution's package of Rust's wasm32 standard library)"
}

choose_wasm_toolchain() {
    WASM_LINKER=
    if rust_has_wasm; then
        WASM_TOOLCHAIN=installed
        WASM_RUSTC="$(rustc --version)"
    elif debian_has_wasm; then
        WASM_TOOLCHAIN=debian
        WASM_RUSTC="$(/usr/bin/rustc --version)"
        WASM_LINKER="$(rust_lld)"
    else
        return 1
    fi
}

# Sets WASM_BINDGEN. The generator must be of exactly the version of the crate.
wasm_bindgen() {
    local version
    version="$(sed -nE 's/^wasm-bindgen = "=([0-9.]+)"$/\1/p' Cargo.toml)"
    [ -n "$version" ] || fail 'Cargo.toml has no line wasm-bindgen = "=X.Y.Z" to read the version from.'
    choose_wasm_bindgen "$version" && return 0
    begin
    choose_wasm_bindgen "$version" && return 0
    say "building wasm-bindgen $version (it writes the wasm module's JavaScript side; a few minutes)"
    CARGO_TARGET_DIR="$SCRATCH/target" \
        cargo install wasm-bindgen-cli --version "$version" --root "$SCRATCH/wasm-bindgen" </dev/null 9>&-
    place "$SCRATCH/wasm-bindgen" "wasm-bindgen-$version"
    choose_wasm_bindgen "$version" || fail "the wasm-bindgen just built is not of version $version."
}

choose_wasm_bindgen() {
    for WASM_BINDGEN in "$(command -v wasm-bindgen || true)" "$TOOLS/wasm-bindgen-$1/bin/wasm-bindgen"; do
        [ -x "$WASM_BINDGEN" ] || continue
        [ "$("$WASM_BINDGEN" --version 2>/dev/null)" != "wasm-bindgen $1" ] || return 0
    done
    return 1
}

npm_ready() {
    have npm || apt_install "it fetches $1" npm || true
    have npm || missing "npm" "$1" "npm" "Node.js with npm, e.g. brew install node, dnf install npm, pacman -S npm"
}

charts() {
    local folder="uplot-$UPLOT"
    [ ! -d "$TOOLS/$folder" ] || return 0
    npm_ready "the page's charts library"
    begin
    [ ! -d "$TOOLS/$folder" ] || return 0
    say "fetching uPlot $UPLOT (the page's charts)"
    mkdir "$SCRATCH/uplot" "$SCRATCH/$folder"
    (cd "$SCRATCH/uplot" && npm --loglevel=error pack "uplot@$UPLOT" >/dev/null 9>&- && tar -xzf ./*.tgz)
    for file in dist/uPlot.esm.js dist/uPlot.min.css LICENSE; do
        cp "$SCRATCH/uplot/package/$file" "$SCRATCH/$folder/"
    done
    place "$SCRATCH/$folder" "$folder"
}

# Sets WASM_OPT; empty when there is none: the page works without, its download is only larger.
wasm_opt() {
    local marker="no-wasm-opt-$BINARYEN"
    choose_wasm_opt && return 0
    # A failure is remembered, so that later runs stay quick.
    [ ! -e "$TOOLS/$marker" ] || return 0
    npm_ready "wasm-opt"
    begin
    choose_wasm_opt && return 0
    say "fetching wasm-opt $BINARYEN (it makes the wasm file smaller and faster)"
    mkdir "$SCRATCH/binaryen"
    if (cd "$SCRATCH/binaryen" && npm --loglevel=error install --no-audit --no-fund --prefix . "binaryen@$BINARYEN" >/dev/null 9>&-) &&
        recent_wasm_opt "$SCRATCH/binaryen/node_modules/.bin/wasm-opt"; then
        place "$SCRATCH/binaryen" "binaryen-$BINARYEN"
        choose_wasm_opt && return 0
    fi
    WASM_OPT=
    touch "$TOOLS/$marker"
    say "no usable wasm-opt: the wasm file stays unoptimised. To try again: put binaryen >= $BINARYEN_OLDEST into PATH, or remove $TOOLS/$marker"
}

recent_wasm_opt() {
    local version
    [ -x "$1" ] || return 1
    version="$("$1" --version 2>/dev/null | sed -nE 's/^wasm-opt version ([0-9]+).*/\1/p')"
    [ -n "$version" ] && [ "$version" -ge "$BINARYEN_OLDEST" ]
}

choose_wasm_opt() {
    WASM_OPT="$(command -v wasm-opt || true)"
    ! recent_wasm_opt "$WASM_OPT" || return 0
    # Tried when it was installed; starting node each time would be slow.
    WASM_OPT="$TOOLS/binaryen-$BINARYEN/node_modules/.bin/wasm-opt"
    [ ! -x "$WASM_OPT" ] || ! have node || return 0
    WASM_OPT=
    return 1
}

web() {
    wasm_toolchain
    wasm_bindgen
    charts
    wasm_opt
    # The choice, for build-web.sh. Looked at afresh by every run, so a compiler that is gone is never relied on.
    local env
    env="$(
        echo "# Written by .ci/setup.sh, read by .ci/build-web.sh."
        for name in WASM_TOOLCHAIN WASM_RUSTC WASM_LINKER WASM_BINDGEN WASM_OPT; do printf '%s=%q\n' "$name" "${!name}"; done
        printf 'UPLOT=%q\n' "$TOOLS/uplot-$UPLOT"
    )"
    if [ "$env" != "$(cat "$TOOLS/wasm.env" 2>/dev/null)" ]; then
        begin
        printf '%s\n' "$env" >"$SCRATCH/wasm.env"
        mv "$SCRATCH/wasm.env" "$TOOLS/wasm.env"
        say "the browser client is built with $WASM_RUSTC ($WASM_TOOLCHAIN)"
    fi
}

# ---- browser: what the browser tests and demo-headless drive ----

has_chromium() {
    [ -z "${CHROMIUM:-}" ] || [ ! -x "$CHROMIUM" ] || return 0
    have chromium || have chromium-browser || have google-chrome
}

has_fonts() { [ "$(uname)" != Linux ] || [ -n "$(find /usr/share/fonts -name '*.[to]tf' 2>/dev/null | head -n 1)" ]; }

browser() {
    local packages=()
    if ! has_chromium || ! have chromedriver || ! has_fonts; then
        begin
        if apt_update; then
            # Ubuntu's names differ from Debian's.
            if [ -n "$(apt-cache show chromium-driver 2>/dev/null)" ]; then
                packages=(chromium chromium-driver fonts-dejavu-core)
            else
                packages=(chromium-browser chromium-chromedriver fonts-dejavu-core)
            fi
            apt_install "the browser tests and demo-headless run real tabs" "${packages[@]}" || true
        fi
    fi
    has_chromium || missing "Chromium" "the browser tests and demo-headless" "chromium chromium-driver fonts-dejavu-core" \
        "Chromium or Chrome as chromium, chromium-browser or google-chrome in PATH, or its path in CHROMIUM"
    have chromedriver || missing "ChromeDriver" "the browser tests and demo-headless" "chromium chromium-driver" \
        "chromedriver of the browser's version in PATH, e.g. brew install chromedriver, dnf install chromedriver"
    has_fonts || say "no fonts are installed: the browser cannot draw text (package fonts-dejavu-core)"
}

# ---- vulkan: software Vulkan, so that the native GPU tests run without a GPU. Optional ----

has_vulkan() {
    [ "$(uname)" = Linux ] || return 0
    [ -z "${VK_DRIVER_FILES:-}${VK_ICD_FILENAMES:-}" ] || return 0
    [ -n "$(find /usr/share/vulkan/icd.d /etc/vulkan/icd.d -name '*.json' 2>/dev/null | head -n 1)" ]
}

vulkan() {
    local marker="no-vulkan"
    has_vulkan || [ -e "$TOOLS/$marker" ] || {
        apt_install "software Vulkan for the native GPU tests" mesa-vulkan-drivers || true
        has_vulkan || {
            begin
            touch "$TOOLS/$marker"
            say "no Vulkan driver: native GPU tests have nothing to run on. Remedy: install mesa-vulkan-drivers"
        }
    }
}

# ---- lint: rustfmt, and clippy for both compilers ----

lint() {
    cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || {
        begin
        say "adding rustfmt and clippy"
        have rustup && rustup component add rustfmt clippy </dev/null 9>&- ||
            fail "rustfmt or clippy is missing: rustup component add rustfmt clippy, or your distribution's packages."
    }
    choose_wasm_toolchain || wasm_toolchain
    if [ "$WASM_TOOLCHAIN" = debian ] && [ ! -x /usr/bin/cargo-clippy ]; then
        apt_install "clippy for the browser client must be of the compiler that builds it" rust-web-clippy || true
        [ -x /usr/bin/cargo-clippy ] || missing "clippy for Debian's compiler" "just lint" "rust-web-clippy" \
            "rustup target add wasm32-unknown-unknown"
    fi
}

# By name: the tools folder may be one that the user chose and keeps other things in.
clean() {
    begin
    for path in "$TOOLS"/wasm-bindgen-* "$TOOLS"/uplot-* "$TOOLS"/binaryen-* "$TOOLS"/no-* "$TOOLS/wasm.env" .tools www/pkg; do
        if [ -e "$path" ]; then
            say "removing $path"
            rm -rf "$path"
        fi
    done
    say "system packages are left alone"
}

[ $# -gt 0 ] || set -- web browser vulkan
for part in "$@"; do
    case "$part" in
    web | browser | vulkan | lint | clean) "$part" ;;
    *) fail "no part is called $part; there are: web browser vulkan lint clean" ;;
    esac
done
