#!/usr/bin/env bash
# Runs a job on GKE as a JobSet (launch/gke_jobset.yaml). The cluster needs TPU node pools, JobSet and
# the Cloud Storage FUSE driver.
#
#   bash launch/gke.sh apply --name NAME --project PROJECT --location LOCATION --cluster CLUSTER \
#     --accelerator v5e-64 --image IMAGE --bucket BUCKET -- --config=FILE --workdir=/gcs/BUCKET/run1
#
# Phases: render (print the manifest), apply (render to runs/gke/NAME.yaml and submit it),
# status, logs (process 0), delete.
#
#   --name, --project, --location, --cluster   the run's name and its cluster
#   --namespace NAME                  (default default)
#   --accelerator v5e-N|v6e-N|v5p-N   chips of a slice (v5p: TensorCores, two per chip)
#   --slices N                        number of slices (default 1)
#   --image IMAGE                     image built from launch/Dockerfile
#   --bucket BUCKET                   Cloud Storage bucket, mounted as /gcs/BUCKET
#   --service-account NAME            Kubernetes account with access to the bucket (default default)
#   --max-restarts N                  restarts after a preemption or a lost host (default 10)
#   --dry-run                         print the commands, run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

declare -A option=(
  [name]="" [project]="" [location]="" [cluster]="" [namespace]=default [accelerator]="" [slices]=1
  [image]="" [bucket]="" [service-account]=default [max-restarts]=10 [dry-run]=no
)
(($#)) || die "the phase is missing: render, apply, status, logs or delete (see --help)"
phase=$1
[[ $phase == -* ]] || shift
parse "$@"
[[ $phase != -* ]] || die "the phase is missing: render, apply, status, logs or delete (see --help)"

# Sets `topology`, the arrangement of the chips, and `gke_accelerator`, the node label of their kind.
read_topology() {
  read_accelerator
  case $tpu_family in
    v5e) gke_accelerator=tpu-v5-lite-podslice ;;
    v6e) gke_accelerator=tpu-v6e-slice ;;
    v5p) gke_accelerator=tpu-v5p-slice ;;
  esac
  case $tpu_family-$tpu_chips in
    v5p-4) topology=2x2x1 ;;
    v5p-8) topology=2x2x2 ;;
    v5p-16) topology=2x2x4 ;;
    v5p-32) topology=2x4x4 ;;
    v5p-64) topology=4x4x4 ;;
    v5p-128) topology=4x4x8 ;;
    v5p-256) topology=4x8x8 ;;
    v5p-512) topology=8x8x8 ;;
    v5e-4 | v6e-4) topology=2x2 ;;
    v5e-8 | v6e-8) topology=2x4 ;;
    v5e-16 | v6e-16) topology=4x4 ;;
    v5e-32 | v6e-32) topology=4x8 ;;
    v5e-64 | v6e-64) topology=8x8 ;;
    v5e-128 | v6e-128) topology=8x16 ;;
    v5e-256 | v6e-256) topology=16x16 ;;
    *) die "--accelerator ${option[accelerator]} has no topology here ($tpu_chips chips)" ;;
  esac
}

# Prints the words as a JSON list, which is also YAML.
json_list() {
  local word list=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    list+=", \"${word//\"/\\\"}\""
  done
  printf '[%s]' "${list:2}"
}

# fill PLACEHOLDER VALUE: adds a substitution to `edits`, the arguments of sed.
fill() {
  local value
  value=$(printf '%s' "$2" | sed 's/[&|\\]/\\&/g')
  edits+=(-e "s|@$1@|$value|g")
}

read_manifest() {
  need image bucket accelerator
  need_count slices max-restarts
  check_bucket
  ((${#rest[@]})) || die "the program's arguments are missing: … -- --config=FILE --workdir=DIR"
  read_topology
  edits=()
  fill NAME "${option[name]}"
  fill NAMESPACE "${option[namespace]}"
  fill MAX_RESTARTS "${option[max-restarts]}"
  fill SLICES "${option[slices]}"
  fill HOSTS "$((tpu_chips / 4))"
  fill CHIPS_PER_HOST 4
  fill GKE_ACCELERATOR "$gke_accelerator"
  fill TOPOLOGY "$topology"
  fill IMAGE "${option[image]}"
  fill BUCKET "${option[bucket]}"
  fill SERVICE_ACCOUNT "${option[service-account]}"
  fill COMMAND "$(json_list python -m zerosearch_jax.main --distributed "${rest[@]}")"
  template=$(dirname "$0")/gke_jobset.yaml
}

on_cluster() {
  run kubectl "--context=gke_${option[project]}_${option[location]}_${option[cluster]}" \
    "--namespace=${option[namespace]}" "$@"
}

need name project location cluster
case $phase in
  render)
    read_manifest
    run sed "${edits[@]}" "$template"
    ;;
  apply)
    read_manifest
    manifest=runs/gke/${option[name]}.yaml
    run gcloud container clusters get-credentials "${option[cluster]}" \
      "--project=${option[project]}" "--location=${option[location]}"
    run mkdir -p runs/gke
    run sed -n "${edits[@]}" -e "w $manifest" "$template"
    on_cluster apply "--filename=$manifest"
    ;;
  status) on_cluster get jobset,pods "--selector=jobset.sigs.k8s.io/jobset-name=${option[name]}" ;;
  logs)
    selector=jobset.sigs.k8s.io/jobset-name=${option[name]},jobset.sigs.k8s.io/job-index=0
    selector+=,batch.kubernetes.io/job-completion-index=0
    on_cluster logs --follow --tail=200 --container=train "--selector=$selector"
    ;;
  delete) on_cluster delete jobset "${option[name]}" ;;
  *) die "there is no phase '$phase' (see --help)" ;;
esac
