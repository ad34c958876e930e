#!/usr/bin/env bash
# Serves a simulator, such as a Simulation_LLM checkpoint, with SGLang or vLLM, which must be
# installed. The protocol is OpenAI's: POST http://HOST:PORT/v1/chat/completions.
#
#   bash launch/sim_server.sh --engine sglang --model models/SearchSimulation_14B --tensor 2
#
#   --engine sglang|vllm   inference engine (on a TPU: vLLM, from the package vllm-tpu)
#   --model DIR_OR_NAME    Hugging Face directory or repository name
#   --served-name NAME     the model's name in requests (default simulator)
#   --tensor N             number of devices that share its weights (default 1)
#   --host, --port         address of the server (default 0.0.0.0 and 6001). There is no access
#                          control: let only the run's network reach it.
#   --dry-run              print the command, run nothing
#
# The words after -- go to the engine. The server runs in the foreground until it is stopped.
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
  *) die "--engine is '${option[engine]}'; use sglang or vllm" ;;
esac
run "${command[@]}" --served-model-name "${option[served-name]}" \
  --host "${option[host]}" --port "${option[port]}" "${rest[@]}"
