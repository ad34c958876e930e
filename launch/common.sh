# shellcheck shell=bash
# Sourced by the other scripts: options, messages, and `run`, which executes every command.

((BASH_VERSINFO[0] >= 5)) || {
  echo "error: these scripts need bash 5 or newer; this is bash $BASH_VERSION" >&2
  exit 2
}

# `run` prints to these copies, because the output of a command may be redirected.
exec 3>&1 4>&2

# Reports bad input on one line; exits with status 2.
die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# Prints the script's head comment as its help.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# Prints the words on one line, quoted for a shell; plain words stay unquoted.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/"'\\''"}'"
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Runs a command and prints it to stderr; with --dry-run only prints it to stdout.
run() {
  if [[ ${option[dry-run]} == yes ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    printf '+ %s\n' "$(quoted "$@")" >&4
    "$@" 3>&- 4>&-
  fi
}

# parse ARGUMENT…: fills the caller's associative array `option`, whose keys are the known options.
# An option whose value is "no" is a flag. The words after `--` become the array `rest`.
parse() {
  local name
  rest=()
  while (($#)); do
    case $1 in
      --help | -h)
        usage
        exit 0
        ;;
      --)
        rest=("${@:2}")
        return
        ;;
      --*) name=${1#--} ;;
      *) die "'$1' is not an option; put the program's arguments after -- (see --help)" ;;
    esac
    [[ $name =~ ^[a-z-]+$ && -n ${option[$name]+known} ]] || die "there is no option $1 (see --help)"
    # shellcheck disable=SC2004 # the array is associative
    if [[ ${option[$name]} == no ]]; then
      option[$name]=yes
      shift
    else
      (($# >= 2)) || die "--$name needs a value"
      option[$name]=$2
      shift 2
    fi
  done
}

# need NAME…: requires these options.
need() {
  local name
  for name in "$@"; do
    [[ -n ${option[$name]} ]] || die "--$name is missing (see --help)"
  done
}

# need_count NAME…: requires these options to be whole numbers from 1.
need_count() {
  local name
  for name in "$@"; do
    [[ ${option[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name must be a whole number from 1"
  done
}

# Requires --bucket, if given, to be a bare name.
check_bucket() {
  [[ ${option[bucket]} =~ ^[a-z0-9._-]*$ ]] || die "--bucket is '${option[bucket]}'; give the bucket's name without gs://"
}

# Reads --accelerator (v5e-16, v6e-64, v5p-128; v5p counts TensorCores, two per chip). Sets
# `tpu_family`, `tpu_chips` and `tpu_type`, the name in Google Cloud's APIs.
# shellcheck disable=SC2034 # The scripts read these variables.
read_accelerator() {
  [[ ${option[accelerator]} =~ ^(v5e|v6e|v5p)-([1-9][0-9]*)$ ]] ||
    die "--accelerator is '${option[accelerator]}'; use v5e-N, v6e-N (chips) or v5p-N (TensorCores)"
  tpu_family=${BASH_REMATCH[1]}
  tpu_chips=${BASH_REMATCH[2]}
  tpu_type=${option[accelerator]}
  case $tpu_family in
    v5e) tpu_type=v5litepod-$tpu_chips ;;
    v5p) tpu_chips=$((tpu_chips / 2)) ;;
  esac
}
