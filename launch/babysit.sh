#!/usr/bin/env bash
# Keeps a run on preemptible TPUs going. After a preemption it creates the TPU again, sets it up and
# starts the same command, which resumes from its workdir in Cloud Storage.
#
#   bash launch/babysit.sh [--max-restarts N] OPTIONS OF launch/tpu_vm.sh \
#     --bucket BUCKET -- --config=FILE --workdir=/gcs/BUCKET/run1
#
#   --max-restarts N   restarts of the program, on the same or a new TPU (default 10)
#   --patience N       checks in a row without progress: no capacity, no answer (default 120)
#   --poll-seconds N   seconds between two checks (default 60)
#   --dry-run          print the commands of one start and one check, run nothing
#   OPTIONS            see: bash launch/tpu_vm.sh --help
#
# Exit status: 0 if the program succeeded on every worker; the program's status if it failed on a
# TPU that still exists, which is no preemption; 1 if this script gives up.
# The TPU is kept for its logs; bash launch/tpu_vm.sh delete … deletes it. This script can be stopped
# and started again at any time: it then watches the running program.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# The options of this script are taken out; tpu_vm.sh checks all others.
declare -A option=([max-restarts]=10 [patience]=120 [poll-seconds]=60 [dry-run]=no)
own=() passed=() rest=()
while (($#)); do
  case $1 in
    --max-restarts | --patience | --poll-seconds)
      own+=("${@:1:2}")
      shift "$(($# > 1 ? 2 : 1))"
      ;;
    --dry-run | --help | -h)
      own+=("$1")
      shift
      ;;
    --)
      rest=("${@:2}")
      break
      ;;
    *)
      passed+=("$1")
      shift
      ;;
  esac
done
program=("${rest[@]}")
parse "${own[@]}"
need_count max-restarts patience
[[ ${option[poll-seconds]} =~ ^[0-9]+$ ]] || die "--poll-seconds must be a whole number"
[[ " ${program[*]}" == *" --workdir=/gcs/"* ]] ||
  die "set --workdir=/gcs/BUCKET/…, because the disk of a new TPU is empty"
[[ " ${passed[*]}" == *" --bucket"* ]] || die "--bucket is missing (see --help)"

# phase NAME OPTION…: runs that phase of tpu_vm.sh.
phase() {
  bash "$(dirname "$0")/tpu_vm.sh" "$1" "${passed[@]}" --poll-seconds "${option[poll-seconds]}" \
    "${@:2}" -- "${program[@]}"
}

if [[ ${option[dry-run]} == yes ]]; then
  for name in create wait setup run state outcome; do
    phase "$name" --dry-run
  done
  exit 0
fi
phase all --dry-run >/dev/null # Wrong options are reported before anything is created.

say() {
  printf '%s %s\n' "$(date '+%F %T')" "$1" >&2
}

starts=0

# restart_or_exit WHY: returns if one more start is allowed, exits otherwise.
restart_or_exit() {
  say "$1"
  if ((starts > option[max-restarts])); then
    say "giving up after ${option[max-restarts]} restarts"
    exit 1
  fi
}

start_program() {
  say "start $((++starts)) of at most $((option[max-restarts] + 1))"
  phase setup && phase run
}

# A failed creation (no capacity) does not count as a start; --patience bounds such checks.
create_and_start() {
  phase create && phase wait && start_program
}

# Prints the program's outcome over all workers: the first failure, else running, absent or 0. Prints
# "unknown" if the workers cannot be reached.
outcome() {
  local answer
  answer=$(phase outcome) || {
    echo unknown
    return
  }
  awk '$1 == "outcome" { seen[$2] = 1; if ($2 ~ /^[1-9]/ && failed == "") failed = $2 }
    END {
      if (failed != "") print failed
      else if ("running" in seen) print "running"
      else if ("absent" in seen) print "absent"
      else if ("0" in seen) print 0
      else print "unknown"
    }' <<<"$answer"
}

failed=""   # the program's status, if the last check found a failure
fruitless=0 # checks in a row without progress
while true; do
  progress=yes found=""
  state=$(phase state) || state=unknown
  case $state in
    READY | ACTIVE)
      found=$(outcome)
      case $found in
        0)
          say "the program has succeeded"
          exit 0
          ;;
        running) ;;
        absent)
          restart_or_exit "the program is not running"
          start_program || progress=no
          ;;
        unknown) progress=no ;;
        "$failed")
          say "the program failed with exit status $found (bash launch/tpu_vm.sh logs …)"
          exit "$found"
          ;;
        *) say "the program ended with exit status $found; checking whether the TPU still exists" ;;
      esac
      ;;
    NOT_FOUND)
      restart_or_exit "the TPU does not exist"
      create_and_start || progress=no
      ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
      restart_or_exit "the TPU is $state"
      { phase delete && create_and_start; } || progress=no
      ;;
    *) progress=no ;; # a transition between states, or no answer
  esac
  # A preemption ends the program shortly before the TPU's state changes. So a failure counts only if
  # the next check finds it again on a TPU that still exists.
  failed=""
  [[ ! $found =~ ^[1-9] ]] || failed=$found
  if [[ $progress == no ]]; then
    ((++fruitless < option[patience])) || {
      say "giving up: the last $fruitless checks made no progress (the TPU is $state)"
      exit 1
    }
  else
    fruitless=0
  fi
  [[ ${option[poll-seconds]} == 0 ]] || sleep "${option[poll-seconds]}"
done
