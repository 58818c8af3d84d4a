# Sourced by demo.sh and test.sh: makes .venv in the checkout, installs what is pinned in constraints.txt, activates it.
# Does nothing but activate when neither the pins nor pyproject.toml have changed since.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with the venv module found; install it (Debian: apt install python3 python3-venv)" >&2
    return 1
}

stamp=$(cat launch/constraints.txt pyproject.toml launch/setup.sh | cksum)
if [ "$(cat .venv/stamp 2>/dev/null)" != "$stamp" ]; then
    python=$(find_python)
    echo "setup: installing into $PWD/.venv with $("$python" --version) (a few minutes, once)"
    rm -rf .venv
    "$python" -m venv .venv
    # torch comes first and by exact version, so that nothing else chooses a build of it.
    .venv/bin/pip install --no-compile --quiet --disable-pip-version-check "$(grep '^torch==' launch/constraints.txt)"
    .venv/bin/pip install --no-compile --quiet --disable-pip-version-check --constraint launch/constraints.txt \
        --editable ".[dev]"
    # All cores compile; pip would use one. Templates among the packages' files cannot be compiled, and need not be.
    .venv/bin/python -m compileall -q -j 0 .venv/lib &> /dev/null || true
    echo "$stamp" > .venv/stamp
fi
source .venv/bin/activate
