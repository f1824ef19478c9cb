#!/bin/sh
# What one GPU does, in at most ten minutes: checks, then figures, then a table; see gpu/
#   benchmarks/gpu.sh [FOLDER] [--cifar10 FOLDER] [--counts FILE]
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$PYTHON" -u -m benchmarks.gpu "$@"
