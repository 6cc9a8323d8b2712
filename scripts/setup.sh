# Sourced by quickstart.sh and test.sh:   . scripts/setup.sh requirements.txt [requirements-dev.txt]
# Leaves the shell in the repository root with $python set to the interpreter of .venv, everything named installed,
# and $here set to where the person stands, because the paths that they typed are relative to it.

fail() { echo "error: $*" >&2; exit 1; }

here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
cd "$root" || exit 1

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

venv_ready() {  # if the making of .venv was interrupted, there is no pip yet
    for python in "$root/.venv/bin/python" "$root/.venv/Scripts/python.exe"; do  # the second is Windows
        new_enough "$python" && { [ -e .venv/requirements.txt ] || "$python" -m pip --version >/dev/null 2>&1; } && return
    done
    return 1
}

if ! venv_ready; then
    for base in python3 python python3.14 python3.13 python3.12 python3.11 none; do
        new_enough "$base" && break
    done
    [ "$base" != none ] || fail "Python 3.11 or newer is needed and none was found: https://www.python.org/downloads"
    echo "Making .venv with $("$base" --version)"
    "$base" -m venv --clear .venv && venv_ready || fail "$base could not make .venv (on Debian, Ubuntu: apt install python3-venv)"
fi

# A copy of each requirements file is kept as it was installed, so that only a changed file is installed again.
for file in "$@"; do
    if ! cmp -s "$file" ".venv/$file"; then
        echo "Installing $file into .venv (a few minutes the first time)"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$file" || fail "pip could not install $file"
        cp "$file" ".venv/$file"
    fi
done
