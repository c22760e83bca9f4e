# Sourced by train.sh and test.sh, in the project's root: `setup FILE...` makes $PYTHON a Python with these requirements.
#
# An active virtual environment is used; else .venv is made. A copy of each requirements file, kept in the environment
# once it is installed, makes a second call a file comparison. An interrupted call leaves no copy: the next one goes on.

die() {
    echo "$0: $*" >&2
    exit 1
}

setup() {
    local environment=${VIRTUAL_ENV:-$PWD/.venv} file installed
    PYTHON=$environment/bin/python
    for file in "$@"; do
        installed=$environment/.installed-${file//\//-}
        cmp -s "$file" "$installed" && continue
        if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
            make_environment "$environment"
        fi
        echo "installing $file into $environment (torch is large: a few minutes, once)" >&2
        "$PYTHON" -m pip install --quiet --requirement "$file" || die "cannot install $file (pip's message is above)"
        cp "$file" "$installed"
    done
}

make_environment() {
    local python
    [ -z "${VIRTUAL_ENV:-}" ] || die "the active virtual environment $VIRTUAL_ENV has no working pip"
    for python in python3 python3.14 python3.13 python3.12 python3.11 none; do
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
    done
    [ "$python" != none ] || die "needs Python 3.11 or later, and finds none"
    "$python" -m venv --clear "$1" || die "cannot make a virtual environment (on Debian: apt-get install python3-venv)"
}
