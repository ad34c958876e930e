#!/usr/bin/env bash
# Runs a job on Cloud TPU VMs: every worker of one or several slices runs the same command.
#
#   bash launch/tpu_vm.sh [PHASE] --name NAME --project PROJECT --zone ZONE --accelerator v6e-64 \
#     --repo URL --bucket BUCKET -- --config=configs/grpo.py:qwen2.5-3b --workdir=/gcs/BUCKET/run1 \
#     --config.mesh.data=8 … (launch/README.md has the whole command)
#
# Phases. Without a phase the script runs create, wait, setup and run.
#   create    request the TPU: v6e and v5p directly, v5e and several slices as a queued resource
#   wait      wait until the TPU is ready (a queue can take hours)
#   setup     on every worker: fetch the code, Python 3.12 and the packages, mount the bucket
#   run       on every worker: start the program in tmux, with its log in ~/zerosearch.log
#   logs      follow that log (--worker, default 0, because process 0 reports for all)
#   outcome   print for every worker: absent, running or the program's exit status
#   state     print the TPU's state: READY, ACTIVE or another state; NOT_FOUND if there is no TPU
#   delete    delete the TPU
#
#   --name, --project, --zone         name and place of the TPU
#   --accelerator v5e-N|v6e-N|v5p-N   chips of a slice (v5p: TensorCores, two per chip)
#   --slices N                        number of slices (default 1)
#   --spot                            cheaper, but may be preempted: see launch/babysit.sh
#   --version NAME                    TPU software version (default: the accelerator's)
#   --repo URL, --branch NAME         git URL of the code; branch, tag or commit (default main)
#   --bucket BUCKET                   Cloud Storage bucket, mounted as /gcs/BUCKET
#   --worker N|all                    worker for logs
#   --poll-seconds N, --wait-minutes N   interval and limit of wait (default 30, 240)
#   --dry-run                         print the commands, run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

declare -A option=(
  [name]="" [project]="" [zone]="" [accelerator]="" [slices]=1 [spot]=no [version]=""
  [repo]="" [branch]=main [bucket]="" [worker]=0 [poll-seconds]=30 [wait-minutes]=240 [dry-run]=no
)
phase=all
[[ $# == 0 || $1 == -* ]] || {
  phase=$1
  shift
}
parse "$@"
need name project zone accelerator
need_count slices wait-minutes
check_bucket
read_accelerator
where=("--project=${option[project]}" "--zone=${option[zone]}")
queued=no
[[ $tpu_family != v5e && ${option[slices]} == 1 ]] || queued=yes

create() {
  local version=${option[version]} spot=()
  case ${version:-$tpu_family} in
    v5e) version=v2-alpha-tpuv5-lite ;;
    v5p) version=v2-alpha-tpuv5 ;;
    v6e) version=v2-alpha-tpuv6e ;;
  esac
  [[ ${option[spot]} == no ]] || spot=(--spot)
  if [[ $queued == no ]]; then
    run gcloud compute tpus tpu-vm create "${option[name]}" "${where[@]}" \
      "--accelerator-type=$tpu_type" "--version=$version" "${spot[@]}"
    return
  fi
  local nodes=("--node-id=${option[name]}")
  [[ ${option[slices]} == 1 ]] ||
    nodes=("--node-count=${option[slices]}" "--node-prefix=${option[name]}")
  run gcloud compute tpus queued-resources create "${option[name]}" "${where[@]}" "${nodes[@]}" \
    "--accelerator-type=$tpu_type" "--runtime-version=$version" "${spot[@]}"
}

state() {
  local kind=(tpu-vm) field=state answer code=0 errors
  [[ $queued == no ]] || {
    kind=(queued-resources)
    field=state.state
  }
  errors=$(mktemp)
  answer=$(run gcloud compute tpus "${kind[@]}" describe "${option[name]}" "${where[@]}" \
    "--format=value($field)" 2>"$errors") || code=$?
  if [[ $code != 0 ]] && grep -q NOT_FOUND "$errors"; then
    answer=NOT_FOUND
  elif [[ $code != 0 ]]; then
    cat "$errors" >&2
  fi
  rm -f "$errors"
  [[ -n $answer ]] || return "$code"
  echo "$answer"
}

wait_until_ready() {
  local deadline=$((SECONDS + 60 * option[wait-minutes])) now
  while true; do
    now=$(state) || now=unknown # One failed query is no reason to give up.
    case $now in
      READY | ACTIVE) return ;;
      FAILED | SUSPEND* | PREEMPTED | TERMINATED | STOPP* | NOT_FOUND)
        echo "error: ${option[name]} will not become ready: $now" >&2
        return 1
        ;;
    esac
    [[ ${option[dry-run]} == no ]] || return 0
    ((SECONDS < deadline)) || {
      echo "error: ${option[name]} is still $now after ${option[wait-minutes]} minutes" >&2
      return 1
    }
    sleep "${option[poll-seconds]}"
  done
}

# on WORKER COMMAND: runs a command by ssh. Several slices are nodes of one queued resource.
on() {
  local ssh=(tpu-vm ssh "${option[name]}")
  [[ ${option[slices]} == 1 ]] || {
    ssh=(queued-resources ssh "${option[name]}" "--node=$1")
  }
  run gcloud compute tpus "${ssh[@]}" "${where[@]}" "--worker=$1" "--command=$2"
}

setup() {
  need repo
  local steps
  steps="set -e; git init --quiet ~/zerosearch_jax; cd ~/zerosearch_jax"
  steps+="; git fetch --quiet --depth=1 $(quoted "${option[repo]}" "${option[branch]}")"
  steps+="; git checkout --quiet --force FETCH_HEAD"
  # The images' Python is older than 3.11.
  steps+="; python3 -m pip install --quiet --user uv"
  steps+="; ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv"
  steps+="; ~/.local/bin/uv pip install --quiet --python .venv/bin/python"
  steps+=" -c constraints-3.12.txt -r requirements.txt \"jax[tpu]\""
  steps+="; command -v tmux >/dev/null || sudo apt-get install --yes --quiet tmux"
  [[ -z ${option[bucket]} ]] || steps+="; $(mount_bucket)"
  on all "$steps"
}

# Names are not cached, because all workers must see the files that one of them writes. A complete
# checkpoint's directories are renamed, which gcsfuse refuses without a limit.
mount_bucket() {
  local keys=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  local bucket=${option[bucket]}
  printf '%s' "command -v gcsfuse >/dev/null || { " \
    "curl -fsSL $packages/doc/apt-key.gpg | sudo tee $keys >/dev/null; " \
    "echo \"deb [signed-by=$keys] $packages gcsfuse-\$(lsb_release -cs) main\" | " \
    "sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null; " \
    "sudo apt-get update --quiet; sudo apt-get install --yes --quiet gcsfuse; }; " \
    "mountpoint -q /gcs/$bucket || { " \
    "sudo mkdir -p /gcs/$bucket; sudo chown \"\$USER\" /gcs/$bucket; " \
    "gcsfuse --implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 " \
    "$bucket /gcs/$bucket; }"
}

start() {
  ((${#rest[@]})) || die "the program's arguments are missing: … -- --config=FILE --workdir=DIR"
  local program
  program=".venv/bin/python -m zerosearch_jax.main --distributed $(quoted "${rest[@]}")"
  program+=" >>~/zerosearch.log 2>&1; echo \$? >~/zerosearch.exit"
  program="tmux new-session -d -s zerosearch $(quoted "$program")"
  on all "cd ~/zerosearch_jax && rm -f ~/zerosearch.exit && $program"
}

outcome() {
  local found
  found="if [ -s ~/zerosearch.exit ]; then echo outcome \$(cat ~/zerosearch.exit)"
  found+="; elif tmux has-session -t zerosearch 2>/dev/null; then echo outcome running"
  on all "$found; else echo outcome absent; fi"
}

delete() {
  if [[ $queued == yes ]]; then
    run gcloud compute tpus queued-resources delete "${option[name]}" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "${option[name]}" "${where[@]}" --quiet
  fi
}

case $phase in
  all)
    need repo
    create
    wait_until_ready
    setup
    start
    ;;
  create) create ;;
  wait) wait_until_ready ;;
  setup) setup ;;
  run) start ;;
  logs) on "${option[worker]}" "tail -n 200 -F ~/zerosearch.log" ;;
  outcome) outcome ;;
  state) state ;;
  delete) delete ;;
  *) die "there is no phase '$phase' (see --help)" ;;
esac
