# shellcheck shell=bash
# Sourced by the other scripts: options, messages, and `run`, through which every command goes.

((BASH_VERSINFO[0] >= 5)) || {
  echo "error: bash 5 or newer is needed, this is $BASH_VERSION" >&2
  exit 2
}

# What `run` prints must not mix with a command's own output, which may be redirected.
exec 3>&1 4>&2

# Bad input: one line, exit status 2.
die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The script's head comment is its help.
usage() {
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# The words as a shell would read them back, on one line; plain words stay unquoted.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/"'\\''"}'"
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Runs a command and says so on stderr; with --dry-run only prints it.
run() {
  if [[ ${option[dry-run]} == yes ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    printf '+ %s\n' "$(quoted "$@")" >&4
    "$@" 3>&- 4>&-
  fi
}

# parse ARGUMENT…: fills the caller's associative array `option`, whose keys are the options there
# are (one whose value is "no" is a flag); what follows `--` becomes the array `rest`.
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
      *) die "'$1' is not understood; the program's arguments follow a -- (see --help)" ;;
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

# need NAME…: those options must have been given.
need() {
  local name
  for name in "$@"; do
    [[ -n ${option[$name]} ]] || die "--$name is missing (see --help)"
  done
}

# need_count NAME…: those options must be whole numbers from 1.
need_count() {
  local name
  for name in "$@"; do
    [[ ${option[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name must be a whole number from 1"
  done
}

# --bucket, where given, must be a bare name.
check_bucket() {
  [[ ${option[bucket]} =~ ^[a-z0-9._-]*$ ]] || die "--bucket is a bucket's name, without gs://"
}

# Reads --accelerator (v5e-16, v6e-64, v5p-128; v5p counts TensorCores, two a chip) into
# `tpu_family`, `tpu_chips` and `tpu_type`, the name that Google Cloud's APIs use.
# shellcheck disable=SC2034 # they are read by the scripts
read_accelerator() {
  [[ ${option[accelerator]} =~ ^(v5e|v6e|v5p)-([1-9][0-9]*)$ ]] ||
    die "--accelerator is '${option[accelerator]}'; say v5e-N, v6e-N (chips) or v5p-N (TensorCores)"
  tpu_family=${BASH_REMATCH[1]}
  tpu_chips=${BASH_REMATCH[2]}
  tpu_type=${option[accelerator]}
  case $tpu_family in
    v5e) tpu_type=v5litepod-$tpu_chips ;;
    v5p) tpu_chips=$((tpu_chips / 2)) ;;
  esac
}
