#!/bin/sh
# Full-size runs on one GPU, the most telling first, as many as fit in MINUTES; see campaign.py
#   benchmarks/campaign.sh MINUTES [--imdb FOLDER] [--cifar10 FOLDER] [--runs FOLDER] [--out FOLDER]
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$PYTHON" -u -m benchmarks.campaign "$@"
