#!/bin/sh
# Put the real coding agents and clients that the tests run beside this script, out of git; a second time they are there.
# The versions are those that the expectations were written against; set KEEPWARM_CLAUDE_VERSION or KEEPWARM_CODEX_VERSION
# to try another. PYTHON is the interpreter that the tests run with.
set -eu
cache="$(dirname "$0")/.cache"
python="${PYTHON:-python3}"

# fetch DIRECTORY PACKAGE VERSION
fetch() {
    if [ "$(cat "$1/version" 2>/dev/null || true)" != "$3" ]; then
        mkdir -p "$1"
        npm install --prefix "$1" --no-audit --no-fund --no-save --loglevel=error "$2@$3" >&2
        echo "$3" >"$1/version"
    fi
}

# Packages of Python, in a place of their own: for_python DIRECTORY HOW REQUIREMENT...
for_python() {
    directory="$1" how="$2"
    shift 2
    if [ "$(cat "$directory/version" 2>/dev/null || true)" != "$*" ]; then
        mkdir -p "$directory"
        case "$how" in
        venv)
            "$python" -m venv "$directory"
            "$directory/bin/pip" install --quiet --disable-pip-version-check "$@" >&2
            ;;
        folder) "$python" -m pip install --quiet --disable-pip-version-check --upgrade --target "$directory" "$@" >&2 ;;
        esac
        echo "$*" >"$directory/version"
    fi
}

fetch "$cache" @anthropic-ai/claude-code "${KEEPWARM_CLAUDE_VERSION:-2.1.197}"
fetch "$cache/codex" @openai/codex "${KEEPWARM_CODEX_VERSION:-0.169.0}"
for_python "$cache/sdks" folder anthropic==2.12.0 openai==3.54.0
for_python "$cache/aiperf" venv aiperf==0.13.0 tokenizers==0.23.3
