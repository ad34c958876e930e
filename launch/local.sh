#!/usr/bin/env bash
# Runs several processes of one job on this machine, each with fake CPU devices.
#
#   bash launch/local.sh --processes 2 --devices-per-process 4 -- --config=configs/grpo.py \
#     --config.mesh.data=8 --config.learner.rows=8 --workdir=runs/local8
#
#   --processes N             number of processes
#   --devices-per-process K   CPU devices of each process (default 1)
#   --program "WORDS"         command of each process
#                             (default ".venv/bin/python -m zerosearch_jax.main")
#   --port PORT               port of the coordinator, process 0 (default: a free port)
#   --grace SECONDS           time between SIGTERM and the end by force (default 600)
#   --log-dir DIR             directory of process_0.log, process_1.log, … (default runs/local)
#   --dry-run                 print each process's command, run nothing
#
# The words after -- go to every process, after --distributed. Process i gets
# JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID=i; its output is prefixed with [i].
# If a process fails, the script ends the others and exits with that process's status. It forwards
# Ctrl-C and SIGTERM, at which the processes save their state. It kills the processes that are
# still running --grace seconds after SIGTERM, or 10 seconds after Ctrl-C or a failure.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

declare -A option=(
  [processes]="" [devices-per-process]=1 [program]=".venv/bin/python -m zerosearch_jax.main"
  [port]="" [grace]=600 [log-dir]=runs/local [dry-run]=no
)
parse "$@"
need processes program
need_count processes devices-per-process grace
read -ra program <<<"${option[program]}"

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000)) # below the range of ephemeral ports
    (exec 5<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

port=${option[port]:-$(free_port)}
devices="--xla_force_host_platform_device_count=${option[devices-per-process]}"
status=0
killer=""
declare -A process_of=() # running processes: pid → number
writers=()

# signal_all SIGNAL: signals every running process and its children.
signal_all() {
  local pid
  for pid in "${!process_of[@]}"; do
    kill -"$1" -- "-$pid" 2>/dev/null || true
  done
}

# end_all SIGNAL SECONDS: signals all, and kills them later. jax.distributed may catch SIGTERM as a
# preemption notice, so a signal alone is not enough.
end_all() {
  signal_all "$1"
  [[ -n $killer ]] || {
    (sleep "$2" && signal_all KILL) </dev/null &>/dev/null &
    killer=$!
  }
}

# write_lines NUMBER: copies stdin to the process's log and, prefixed, to stdout. It ignores Ctrl-C.
# It does not use awk or sed, because some of them buffer lines.
write_lines() {
  trap '' INT TERM
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line" >&5
    printf '[%s] %s\n' "$1" "$line"
  done 5>"${option[log-dir]}/process_$1.log"
}

[[ ${option[dry-run]} == yes ]] || mkdir -p "${option[log-dir]}"
set -m # One process group per process: signals reach whole groups, Ctrl-C only this script.
trap 'status=130; end_all INT 10' INT
trap 'status=143; end_all TERM "${option[grace]}"' TERM

for ((i = 0; i < option[processes]; i++)); do
  command=(
    env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=${option[processes]}"
    "JAX_PROCESS_ID=$i" JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$devices"
    "${program[@]}" --distributed "${rest[@]}"
  )
  if [[ ${option[dry-run]} == yes ]]; then
    run "${command[@]}"
    continue
  fi
  exec {output}> >(write_lines "$i")
  writers+=($!)
  run exec "${command[@]}" </dev/null >&"$output" 2>&1 & # With exec the pid is the program's.
  process_of[$!]=$i
  exec {output}>&-
done

while ((${#process_of[@]})); do
  for pid in "${!process_of[@]}"; do
    kill -0 "$pid" 2>/dev/null && continue
    code=0
    wait "$pid" || code=$?
    number=${process_of[$pid]}
    unset "process_of[$pid]"
    if ((code != 0 && status == 0)); then
      status=$code
      echo "error: process $number of ${option[processes]} ended with exit status $code;" \
        "ending the others (log: ${option[log-dir]}/process_$number.log)" >&2
      end_all TERM 10
    fi
  done
  sleep 0.2
done
for writer in "${writers[@]}"; do
  wait "$writer" || true # All output is written before this script ends.
done
[[ -z $killer ]] || kill -- "-$killer" 2>/dev/null || true
exit "$status"
