#!/usr/bin/env bash
# Every command behind the published numbers: lists them, or runs them here or on a cluster. See ./benchmark.sh --help
cd "$(dirname "$0")" && exec python benchmark/benchmark.py "$@"
