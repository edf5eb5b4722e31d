#!/bin/sh
# Put the real coding agent that tests/test_real_claude.py runs beside this script, out of git; a second time it is there.
# VERSION is the one the expectations were written against; set KEEPWARM_CLAUDE_VERSION to try another.
set -eu
VERSION="${KEEPWARM_CLAUDE_VERSION:-2.1.197}"
cache="$(dirname "$0")/.cache"
if [ "$(cat "$cache/version" 2>/dev/null || true)" != "$VERSION" ]; then
    mkdir -p "$cache"
    npm install --prefix "$cache" --no-audit --no-fund --no-save --loglevel=error "@anthropic-ai/claude-code@$VERSION" >&2
    echo "$VERSION" >"$cache/version"
fi
