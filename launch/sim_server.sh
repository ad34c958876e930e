#!/usr/bin/env bash
# A simulation server beside the run: SGLang or vLLM (installed here) serves a simulator, such as
# a Simulation_LLM checkpoint, by OpenAI's protocol: POST http://HOST:PORT/v1/chat/completions.
#
#   bash launch/sim_server.sh --engine sglang --model models/SearchSimulation_14B --tensor 2
#
#   --engine sglang|vllm   (on a TPU: vLLM, from the package vllm-tpu)
#   --model DIR_OR_NAME    a Hugging Face directory or a repository's name
#   --served-name NAME     what requests call it (default simulator)
#   --tensor N             over how many devices its weights are split (default 1)
#   --host, --port         where it listens (default 0.0.0.0 and 6001; there is no access control:
#                          let only the run's network reach it)
#   --dry-run              print the command, run nothing
#
# What follows -- is handed to the engine. It runs in the foreground until it is stopped.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

declare -A option=(
  [engine]="" [model]="" [served-name]=simulator [tensor]=1 [host]=0.0.0.0 [port]=6001 [dry-run]=no
)
parse "$@"
need engine model
need_count tensor port
case ${option[engine]} in
  sglang)
    command=(
      python -m sglang.launch_server --model-path "${option[model]}" --tp-size "${option[tensor]}"
    )
    ;;
  vllm) command=(vllm serve "${option[model]}" --tensor-parallel-size "${option[tensor]}") ;;
  *) die "--engine is '${option[engine]}'; say sglang or vllm" ;;
esac
run "${command[@]}" --served-model-name "${option[served-name]}" \
  --host "${option[host]}" --port "${option[port]}" "${rest[@]}"
