# Sourced by quickstart.sh and test.sh: makes .venv in the project's folder and installs raylhf into it.
# Knobs (environment): RAYLHF_ACCELERATOR=cpu|gpu instead of detection, PIP_FIND_LINKS=folder of local wheels,
# PIP_INDEX_URL / PIP_EXTRA_INDEX_URL or uv's own UV_* settings for a package mirror.

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
fail() { printf 'raylhf: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; install one (for instance 'apt-get install python3.11 python3.11-venv')"
}

has_local_cpu_torch() {
    local folder
    for folder in ${PIP_FIND_LINKS:-}; do
        compgen -G "${folder#file://}/torch-*+cpu-*.whl" >/dev/null && return 0
    done
    return 1
}

# has_lines FILE PREFIX WORD...: whether FILE has the line "PREFIX WORD" for each word.
has_lines() {
    local file=$1 prefix=$2 word
    shift 2
    for word in "$@"; do grep -qxF "$prefix $word" "$file" || return 1; done
}

# setup_environment EXTRA...: creates or completes .venv; does nothing when it is up to date.
setup_environment() {
    local accelerator=${RAYLHF_ACCELERATOR:-}
    if [ -z "$accelerator" ]; then
        if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then accelerator=gpu; else accelerator=cpu; fi
    fi
    local extras=$accelerator extra
    for extra in "$@"; do extras+=",$extra"; done
    local wanted
    wanted="$accelerator $(cat pyproject.toml launch/constraints-cpu.txt | cksum) $PWD"
    local installed=.venv/.raylhf # a line for each group of extras that is in place
    if [ -f "$installed" ] && has_lines "$installed" "$wanted" base "$@"; then
        say "environment .venv is up to date ($extras)"
        return
    fi
    [ -w . ] || fail "this folder is not writable; clone the project into one of your own"
    local free
    free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge 8 ] || fail "only $free GiB free here; the environment needs 8"
    local python
    python=$(find_python) || exit 1
    say "creating .venv with $("$python" --version) for $accelerator ($extras)"
    "$python" -m venv .venv || fail "cannot create .venv; on Debian and Ubuntu install python3-venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || fail "cannot install uv from the package index; see the message above"
    # Compiled once, here: every run starts a dozen processes, which would else compile 10 s long where they may not write.
    local options=(--python .venv/bin/python --compile-bytecode) folder
    for folder in ${PIP_FIND_LINKS:-}; do options+=(--find-links "$folder"); done
    if [ "$accelerator" = cpu ]; then
        options+=(--constraint launch/constraints-cpu.txt) # on a GPU, vLLM's own pins decide
        # The CPU build of torch is not on the default index: take a local wheel, or let uv find PyTorch's own index.
        has_local_cpu_torch || options+=(--torch-backend cpu)
    fi
    export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}
    export UV_INDEX=${UV_INDEX:-${PIP_EXTRA_INDEX_URL:-}}
    [ -n "$UV_DEFAULT_INDEX" ] || unset UV_DEFAULT_INDEX
    [ -n "$UV_INDEX" ] || unset UV_INDEX
    say "installing raylhf[$extras] (about 3 GB; one to five minutes)"
    .venv/bin/uv pip install --quiet "${options[@]}" -e ".[$extras]" || fail "installation failed; see the message above"
    .venv/bin/python -c 'import vllm, deepspeed, ray' 2>/dev/null >/dev/null || {
        .venv/bin/python -c 'import vllm, deepspeed, ray'
        fail "installed, but an engine does not import; see the message above"
    }
    has_lines "$installed" "$wanted" base 2>/dev/null || : >"$installed" # what an older environment held says nothing
    for extra in base "$@"; do echo "$wanted $extra"; done >>"$installed"
    say "environment .venv is ready"
}
