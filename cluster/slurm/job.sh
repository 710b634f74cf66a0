#!/usr/bin/env bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Ray on the nodes of a Slurm allocation, and a command on it:
#
#   sbatch --job-name demo --nodes 4 --gpus-per-node 8 cluster/slurm/job.sh COMMAND ...
#
# The first node is the head and runs COMMAND; `lvm-ray submit --to slurm` calls it so. The directory in which sbatch is called
# and the environment that `ray` is in (on PATH) must be on storage that all nodes share. Nodes are taken whole (--exclusive),
# so the ports are the fixed ones of docs/cluster.md. Five minutes before the time is over COMMAND gets a SIGTERM: lvm-ray then
# saves and leaves with exit code 143, and the same sbatch command goes on from there.
#
# The token is made anew for each job, in a folder of its own beside the log, and goes with the job. Other users of the cluster
# reach the ports, and get nowhere without it. What this script ends is what it started.
set -euo pipefail

fail() {
    echo "job.sh: $1" >&2
    exit "${2:-1}"
}

(($#)) || fail "no command: sbatch ... job.sh COMMAND ..." 2
[[ -n ${SLURM_JOB_ID:-} ]] || fail "not in a Slurm job: start it with sbatch" 2
command -v ray >/dev/null || fail "no ray on PATH: activate the environment that lvm-ray is installed in, then sbatch" 2

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
((${#nodes[@]})) || fail "scontrol names no node of $SLURM_JOB_NODELIST"
address=${nodes[0]}:6379

folder=$(mktemp -d "${SLURM_SUBMIT_DIR:-$PWD}/.lvm-ray-$SLURM_JOB_ID.XXXXXX") # 0700
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

started=() # processes to end, the last first: the command, the other nodes, the head
finish() {
    trap - EXIT TERM
    for ((last = ${#started[@]} - 1; last >= 0; last--)); do
        kill -TERM "${started[last]}" 2>/dev/null || true
        wait "${started[last]}" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 143' TERM

# Ray's logs and sockets: a folder on each node, in TMPDIR or /tmp, that nobody else could have made before.
temporary=$(mktemp -d -t lvm-ray.XXXXXX)

# await COUNT LOG: until so many nodes say in a log that they run.
await() {
    local running
    for _ in {1..300}; do
        running=$(grep -cs 'Ray runtime started' "$2" || true)
        ((${running:-0} >= $1)) && return
        kill -0 "${started[-1]}" 2>/dev/null || { cat "$2" >&2; fail "Ray ended while it started: its output stands above"; }
        sleep 1
    done
    fail "${running:-0} of $1 nodes started Ray within 300 s: $(tail -n 1 "$2")"
}

ports=(
    --node-manager-port=6380 --object-manager-port=6381 --dashboard-agent-grpc-port=52366 --runtime-env-agent-port=52367
    --dashboard-agent-listen-port=52365 --metrics-export-port=8080 --min-worker-port=10002 --max-worker-port=19999
)

pool=${SLURM_GPUS_ON_NODE:+gpu} # as the nodes of Kubernetes and of the launcher are labelled
ray start --head --block --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 --ray-client-server-port=10001 \
    "${ports[@]}" --num-cpus="$SLURM_CPUS_ON_NODE" --labels="pool=${pool:-cpu}" --temp-dir="$temporary" \
    >"$folder/head.log" 2>&1 &
started+=($!)
await 1 "$folder/head.log"

if ((${#nodes[@]} > 1)); then
    others=$((${#nodes[@]} - 1))
    # In single quotes: CPUs, GPUs and folder are each node's own.
    # shellcheck disable=SC2016
    srun --nodes=$others --ntasks=$others --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${nodes[*]:1}")" \
        --cpu-bind=none --kill-on-bad-exit=0 \
        bash -c 'pool=${SLURM_GPUS_ON_NODE:+gpu}
            exec ray start --block --num-cpus="$SLURM_CPUS_ON_NODE" --labels="pool=${pool:-cpu}" \
                --temp-dir="$(mktemp -d -t lvm-ray.XXXXXX)" "$@"' node --address="$address" "${ports[@]}" >"$folder/nodes.log" 2>&1 &
    started+=($!)
    await $others "$folder/nodes.log"
fi

echo "job.sh: Ray runs on ${#nodes[@]} nodes of job $SLURM_JOB_ID; its logs are in ${TMPDIR:-/tmp}/lvm-ray.* on each"
RAY_ADDRESS=$address "$@" &
command=$!
started+=("$command")
trap 'kill -TERM "$command" 2>/dev/null || true' TERM # the command decides: it saves and leaves
while true; do # a signal ends the waiting, not the command
    code=0
    wait "$command" || code=$?
    kill -0 "$command" 2>/dev/null || exit $code
done
