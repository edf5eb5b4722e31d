#!/bin/sh
# Put the real coding agents that the tests run beside this script, out of git; a second time they are there.
# The versions are those that the expectations were written against; set KEEPWARM_CLAUDE_VERSION or KEEPWARM_CODEX_VERSION
# to try another.
set -eu
cache="$(dirname "$0")/.cache"

# fetch DIRECTORY PACKAGE VERSION
fetch() {
    if [ "$(cat "$1/version" 2>/dev/null || true)" != "$3" ]; then
        mkdir -p "$1"
        npm install --prefix "$1" --no-audit --no-fund --no-save --loglevel=error "$2@$3" >&2
        echo "$3" >"$1/version"
    fi
}

fetch "$cache" @anthropic-ai/claude-code "${KEEPWARM_CLAUDE_VERSION:-2.1.197}"
fetch "$cache/codex" @openai/codex "${KEEPWARM_CODEX_VERSION:-0.169.0}"
