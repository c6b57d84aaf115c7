# Every recipe does the set-up that it needs, and says so. Start with: just demo

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

model := "server/models/nano-llava"
fednano := env("CARGO_TARGET_DIR", "target") / "release/fednano"

# List the recipes
default:
    @just --list --unsorted

# A federation of two native participants and your browser: open the link that it prints
[no-exit-message]
demo *ARGS: web build
    @{{ fednano }} demo --model {{ model }} --www www "$@"

# The demo with three headless Chromium tabs as its participants
[no-exit-message]
demo-headless *ARGS: (_tools "browser") web build
    @{{ fednano }} demo --headless 3 --model {{ model }} --www www "$@"

# Run every test; ARGS go to the runner, e.g. a part of a test's name
[no-exit-message]
test *ARGS: setup
    @if command -v cargo-nextest >/dev/null; then \
        cargo nextest run --release --workspace "$@"; \
    else \
        cargo test --release --workspace --lib --bins --tests --no-fail-fast "$@"; \
    fi

# The rules of the rounds in N random sequences (the tests take 10000)
rounds N="100000":
    FEDNANO_SEQUENCES={{ N }} cargo test --release --workspace -- rounds::

# Check formatting and clippy, natively and for the browser client
lint: (_tools "lint")
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings
    bash .ci/build-web.sh clippy

# Install whatever is missing for the demo and the tests, and build the page's wasm
setup: (_tools "web" "browser" "vulkan") web

# Build the browser client into www/pkg
web:
    @bash .ci/build-web.sh

# Build everything native (always the whole workspace: another set of packages would compile burn a second time)
build:
    cargo build --release --workspace

# Train nano-llava anew, the demo's model
pretrain *ARGS: build
    @{{ fednano }} pretrain "$@"

# Run a federation in one process, without browsers
simulate *ARGS: build
    @{{ fednano }} simulate "$@"

# The study: runs that are not in docs/results yet, then its tables, plots and reading; --quick: all of it in a minute
paper *ARGS: build
    @{{ fednano }} paper "$@"

# The boundary measured: bytes, accuracy and times of every mode and format into docs/wire.md; --quick: all of it in a minute
bench-wire *ARGS: build
    @{{ fednano }} bench-wire "$@"

# Fetch the easy-VQA data set (MIT licence) into data/easy-vqa
easy-vqa:
    #!/usr/bin/env bash
    set -euo pipefail
    if [ -e data/easy-vqa ]; then echo "data/easy-vqa is there already"; exit; fi
    python3 -m pip --version >/dev/null 2>&1 || {
        echo "easy-VQA comes as a Python package: install python3 and pip (Debian, Ubuntu: python3-pip)" >&2
        exit 1
    }
    mkdir -p data
    work="$(mktemp -d data/.easy-vqa.XXXXXX)"
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    echo "fetching easy-VQA's Python package, for the data in it"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$work" easy-vqa
    python3 -m zipfile -e "$work"/*.whl "$work/wheel"
    found="$(find "$work/wheel" -path '*/train/questions.json' | head -n 1)"
    from="${found%/train/questions.json}"
    for part in train test; do
        if [ -z "$found" ] || [ ! -f "$from/$part/questions.json" ] || [ ! -d "$from/$part/images" ]; then
            echo "the package does not hold $part/questions.json and $part/images as expected" >&2
            exit 1
        fi
    done
    mv "$from" data/easy-vqa
    echo "data/easy-vqa is ready"

# Remove www/pkg and the tools that the set-up built (system packages stay)
clean-setup: (_tools "clean")
    rm -rf "${CARGO_TARGET_DIR:-target}/wasm-web"

_tools *PARTS:
    @bash .ci/setup.sh "$@"
