#!/usr/bin/env bash
# A head and some more Ray nodes on this machine, to try a cluster without having one. They listen on 127.0.0.1 alone.
#
#   cluster/local/nodes.sh [NODES]                 start, say how to use it, and stay until Ctrl-C
#   cluster/local/nodes.sh NODES -- COMMAND ...    start, run the command on it, and end with the command's exit code
#
# NODES (2) come beside the head, each with CPUS (2) logical CPUs: they only count places, so there may be more than cores.
# A second cluster at the same time needs other ports: PORT_OFFSET=100 moves them. `ray` must be on PATH, with ray[default].
# The token is made anew each time, in a folder that only you can read. What else runs of Ray on this machine is left alone.
set -euo pipefail

fail() {
    echo "nodes.sh: $1" >&2
    exit "${2:-1}"
}

nodes=${1:-2}
[[ $nodes =~ ^[0-9]+$ ]] || fail "$nodes: usage: nodes.sh [NODES] [-- COMMAND ...]" 2
[[ ${2:---} == -- ]] || fail "$2: usage: nodes.sh [NODES] [-- COMMAND ...]" 2
command -v ray >/dev/null || fail "no ray on PATH: activate the environment that lvm-ray is installed in" 2
python=$(dirname "$(command -v ray)")/python
command=("${@:3}")

offset=${PORT_OFFSET:-0}
gcs=$((6379 + offset)) dashboard=$((8265 + offset)) client=$((10001 + offset))
export AUTOSCALER_METRIC_PORT=$((44217 + offset)) DASHBOARD_METRIC_PORT=$((44227 + offset))

folder=$(mktemp -d /tmp/lvm-ray.XXXXXX) # 0700; and short, since the path of a socket may have 107 characters
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$folder/token")
unset RAY_AUTH_TOKEN RAY_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# `ray start` takes the machine's own address where it is told 127.0.0.1, and then listens to the network. Here it does as it is told;
# and what joins, the workers and drivers that inherit this, looks for the cluster there.
loopback='import ray._private.ray_constants as constants, ray._private.services as services
constants.ENABLE_RAY_CLUSTER, services.resolve_ip_for_localhost = True, lambda host: host
from ray.scripts.scripts import main; main()'
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0

started=() # processes to end, the last first: the command, the nodes, the head. Each node ends what it started
finish() {
    trap - EXIT INT TERM
    for ((last = ${#started[@]} - 1; last >= 0; last--)); do
        kill -TERM "${started[last]}" 2>/dev/null || true
        wait "${started[last]}" 2>/dev/null || true
    done
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start NAME FLAG ...: one Ray node, until it says that it runs. In a session of its own, so that Ctrl-C comes to `finish` alone.
# Ports that nobody has to know are free ones: several nodes share this address.
start() {
    local log=$folder/$1.log
    setsid "$python" -c "$loopback" start --block --node-ip-address=127.0.0.1 --num-cpus="${CPUS:-2}" --labels=pool=cpu \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --temp-dir="$folder/ray" "${@:2}" >"$log" 2>&1 &
    started+=($!)
    for _ in {1..240}; do
        grep -qs 'Ray runtime started' "$log" && return
        kill -0 "${started[-1]}" 2>/dev/null || { cat "$log" >&2; fail "$1 ended while it started: its output stands above"; }
        sleep 0.5
    done
    fail "$1 did not start within 120 s: $(tail -n 1 "$log")"
}

start head --head --port=$gcs --dashboard-host=127.0.0.1 --dashboard-port=$dashboard --ray-client-server-port=$client
for ((index = 1; index <= nodes; index++)); do
    start "node $index" --address=127.0.0.1:$gcs
done

if ((${#command[@]})); then
    RAY_ADDRESS=127.0.0.1:$gcs "${command[@]}" &
    started+=($!)
    code=0
    wait $! || code=$?
    exit $code
fi
cat <<END
A head and $nodes nodes run. In another terminal:

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$folder/token
    lvm-ray submit --to ray --address http://127.0.0.1:$dashboard demo recipes/demo.yaml --run "\$PWD/runs/demo" --follow

The dashboard is http://127.0.0.1:$dashboard: it asks for what is in that file. Ctrl-C ends all of it.
END
wait
