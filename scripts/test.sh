#!/usr/bin/env bash
# Lint and every test, in an environment of their own:
#   bash scripts/test.sh                        all of it
#   bash scripts/test.sh tests/dataset -x       arguments go to pytest
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-dev.txt
# One thread per test process: the shapes are tiny, and threads that wait for each other cost more than they bring.
export OMP_NUM_THREADS=1
"$python" -m ruff check . || exit 1
# A few processes, each with whole files: most tests need one core, and the tests of a file share what it builds.
exec "$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@"
