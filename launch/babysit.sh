#!/usr/bin/env bash
# Keeps a run on preemptible TPUs going: when the TPU is taken away it is created anew, set up, and
# the same command is started, which resumes from its workdir in Cloud Storage.
#
#   bash launch/babysit.sh [--max-restarts N] OPTIONS OF launch/tpu_vm.sh \
#     --bucket BUCKET -- --config=FILE --workdir=/gcs/BUCKET/run1
#
#   --max-restarts N   how often a TPU is created anew or the program started anew (default 10)
#   --patience N       looks in a row that lead nowhere: no capacity, no answer (default 120)
#   --poll-seconds N   between two looks (default 60)
#   --dry-run          print the commands of one start and one look, run nothing
#   OPTIONS            see: bash launch/tpu_vm.sh --help
#
# It ends with 0 when the program has succeeded on every worker, with the program's status when it
# failed on a TPU that is still there (that is no preemption), and with 1 when it has to give up.
# The TPU is left as it is, for its logs: bash launch/tpu_vm.sh delete … gives it back. Stopped and
# started again, it goes on watching what runs.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

# Its own options are taken out; all others are checked by tpu_vm.sh.
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
  die "say --workdir=/gcs/BUCKET/…: a TPU that is created anew has an empty disk"
[[ " ${passed[*]}" == *" --bucket"* ]] || die "--bucket is missing (see --help)"

# phase NAME OPTION…: that phase of tpu_vm.sh.
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
phase all --dry-run >/dev/null # what is wrong with the options shows before anything is created

say() {
  printf '%s %s\n' "$(date '+%F %T')" "$1" >&2
}

starts=0

# start_again WHY: whether there may be one more start; if not, gives up.
start_again() {
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

# A creation that fails (no capacity) is no start; looks that lead nowhere are bounded, too.
create_and_start() {
  phase create && phase wait && start_program
}

# The program's outcome over all workers: the first failure, else running, absent or 0; "unknown"
# when the workers cannot be asked.
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

failed=""   # the program's status, if it had failed at the last look
fruitless=0 # looks in a row that led nowhere
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
          start_again "the program does not run"
          start_program || progress=no
          ;;
        unknown) progress=no ;;
        "$failed")
          say "the program failed with exit status $found (bash launch/tpu_vm.sh logs …)"
          exit "$found"
          ;;
        *) say "the program ended with exit status $found; is the TPU still there?" ;;
      esac
      ;;
    NOT_FOUND)
      start_again "there is no TPU"
      create_and_start || progress=no
      ;;
    PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
      start_again "the TPU is $state"
      { phase delete && create_and_start; } || progress=no
      ;;
    *) progress=no ;; # on its way from one state to another, or no answer
  esac
  # A preemption also ends the program, shortly before the TPU's state tells: so a failure counts
  # when the next look finds it on a TPU that is still there.
  failed=""
  [[ ! $found =~ ^[1-9] ]] || failed=$found
  if [[ $progress == no ]]; then
    ((++fruitless < option[patience])) || {
      say "giving up: the last $fruitless looks led nowhere (the TPU is $state)"
      exit 1
    }
  else
    fruitless=0
  fi
  [[ ${option[poll-seconds]} == 0 ]] || sleep "${option[poll-seconds]}"
done
