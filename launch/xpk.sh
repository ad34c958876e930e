#!/usr/bin/env bash
# Runs a job on GKE with xpk (pip install xpk), which creates and submits the JobSet.
#
#   bash launch/xpk.sh create --name NAME --project PROJECT --zone ZONE --cluster CLUSTER \
#     --accelerator v5e-64 --image IMAGE -- --config=FILE --workdir=/gcs/BUCKET/run1
#
# Phases: storage (once per cluster: mounts the bucket as /gcs/BUCKET), create, status, delete.
#
#   --name, --project, --zone, --cluster   the run's name and its cluster
#   --accelerator v5e-N|v6e-N|v5p-N   chips of a slice (v5p: TensorCores, two per chip)
#   --slices N                        number of slices (default 1)
#   --image IMAGE                     image built from launch/Dockerfile
#   --bucket BUCKET                   Cloud Storage bucket for the phase storage, and its name there
#   --max-restarts N                  restarts after a preemption or a lost host (default 10)
#   --dry-run                         print the commands, run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

declare -A option=(
  [name]="" [project]="" [zone]="" [cluster]="" [accelerator]="" [slices]=1 [image]="" [bucket]=""
  [max-restarts]=10 [dry-run]=no
)
(($#)) || die "the phase is missing: storage, create, status or delete (see --help)"
phase=$1
[[ $phase == -* ]] || shift
parse "$@"
need project zone cluster
where=(
  "--project=${option[project]}" "--zone=${option[zone]}" "--cluster=${option[cluster]}"
)

case $phase in
  storage)
    need bucket
    check_bucket
    run xpk storage attach "${option[bucket]}" "${where[@]}" --type=gcsfuse \
      "--bucket=${option[bucket]}" "--mount-point=/gcs/${option[bucket]}" --readonly=false \
      --size=1 --auto-mount=true \
      --mount-options=implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:100000
    ;;
  create)
    need name accelerator image
    need_count slices max-restarts
    ((${#rest[@]})) || die "the program's arguments are missing: … -- --config=FILE --workdir=DIR"
    read_accelerator
    run xpk workload create "--workload=${option[name]}" "${where[@]}" "--tpu-type=$tpu_type" \
      "--num-slices=${option[slices]}" "--docker-image=${option[image]}" \
      "--max-restarts=${option[max-restarts]}" --termination-grace-period-seconds=600 \
      "--command=python -m zerosearch_jax.main --distributed $(quoted "${rest[@]}")"
    ;;
  status)
    need name
    run xpk workload list "${where[@]}" "--filter-by-job=${option[name]}"
    ;;
  delete)
    need name
    run xpk workload delete "--workload=${option[name]}" "${where[@]}"
    ;;
  *) die "the phase is missing: storage, create, status or delete (see --help)" ;;
esac
