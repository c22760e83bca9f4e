# Sourced by train.sh and test.sh: `setup ROOT FILE...` makes $PYTHON a Python with these requirements installed.
#
# An active virtual environment is used; else ROOT/.venv is made. What was installed is noted in the environment, so that
# a second call costs a checksum. An interrupted call leaves no note, and the next one goes on from there.

die() {
    echo "$0: $*" >&2
    exit 1
}

setup() {
    local root=$1 environment=${VIRTUAL_ENV:-$1/.venv} file note
    PYTHON=$environment/bin/python
    shift
    for file in "$@"; do
        note=$environment/.installed-$(cksum <"$root/$file" | tr ' ' -)
        [ -e "$note" ] && "$PYTHON" -c '' 2>/dev/null && continue
        [ -n "${VIRTUAL_ENV:-}" ] || make_environment "$environment"
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
    "$1/bin/python" -c '' 2>/dev/null && return
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || die "needs Python 3.11 or later, and finds none"
    "$python" -m venv --upgrade "$1" 2>/dev/null || "$python" -m venv "$1" ||
        die "cannot make a virtual environment in $1 (on Debian: apt-get install python3-venv)"
}
