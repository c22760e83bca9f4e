# Sourced by the scripts that start training and tests.
#
# `setup ROOT FILE...` makes $PYTHON a Python with these requirements installed: an active virtual environment is used;
# else ROOT/.venv is made. What was installed is noted in the environment, so that a second call costs a checksum. An
# interrupted call leaves no note, and the next one goes on from there.
# `count_cores` prints how many cores there are. `count_ranks` sets $ranks, the ranks to start on this machine: $NPROC,
# else one a GPU, else 2. `share_cores` gives each its share of the cores, unless OMP_NUM_THREADS says otherwise.

die() {
    echo "$0: $*" >&2
    exit 1
}

setup() {
    local root=$1 environment=${VIRTUAL_ENV:-$1/.venv} file note
    PYTHON=$environment/bin/python
    shift
    [ -n "${VIRTUAL_ENV:-}" ] || make_environment "$environment"
    for file in "$@"; do
        note=$environment/.installed-$(cksum <"$root/$file" | tr ' ' -)
        [ -e "$note" ] && "$PYTHON" -c '' 2>/dev/null && continue
        [ -x "$PYTHON" ] || die "VIRTUAL_ENV=$environment has no bin/python: unset it, and this script makes its own"
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$PYTHON is no Python 3.11 or later"
        "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
            die "$environment has no pip: put one in, or deactivate it and let this script make its own"
        echo "installing $file into $environment (torch is large: a few minutes, once)" >&2
        "$PYTHON" -m pip install --quiet --requirement "$root/$file" || die "cannot install $file: see above"
        touch "$note"
    done
}

make_environment() {
    local python
    "$1/bin/python" -c '' 2>/dev/null && [ -e "$1/bin/activate" ] && return
    for python in "$1/bin/python" python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || die "needs Python 3.11 or later, and finds none"
    "$1/bin/python" -c '' 2>/dev/null || rm -f "$1"/bin/python* # links to a Python that is gone
    "$python" -m venv "$1" ||
        die "cannot make a virtual environment in $1 (on Debian: apt-get install python3-venv)"
}

count_ranks() {
    local gpus
    gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
    if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true)
    fi
    ranks=${NPROC:-$((gpus > 0 ? gpus : 2))}
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || die "NPROC=$ranks is not a number of ranks"
}

count_cores() {
    nproc 2>/dev/null || getconf _NPROCESSORS_ONLN # nproc counts those that this job may use
}

share_cores() {
    local cores
    cores=$(count_cores)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
}
