#!/usr/bin/env bash
# From nothing to a chat:
#   bash scripts/quickstart.sh                  make .venv, install, train a small model, score it (about 9 minutes on 2 cores)
#   bash scripts/quickstart.sh --minutes 20     train longer; every flag goes to scripts/quickstart.py, --help lists them
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
cd "$here" && exec "$python" "$root/scripts/quickstart.py" "$@"
