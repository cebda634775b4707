# shellcheck shell=bash
# Sourced by ray_head.sh and ray_worker.sh: what a node offers to Ray, and on which ports. Environment:
#   RAYLHF_PORT_BASE       first of 250 ports that this cluster uses on every node (default 10000); the head listens on it
#   RAYLHF_NODE_IP         address of this node (default: that of its host name)
#   RAYLHF_RESOURCES       further Ray resources as JSON, for instance {"rollout_nodes": 1}
#   RAYLHF_NUM_CPUS, RAYLHF_NUM_GPUS, RAYLHF_MEMORY_MIB, RAYLHF_OBJECT_STORE_MIB
#                          default: what Slurm gave on this node; outside of Slurm, what Ray finds
#   RAY_AUTH_TOKEN_PATH    file with the cluster's token, the same on every node, mode 600

fail() { printf 'raylhf: %s: %s\n' "$(hostname)" "$*" >&2; exit 1; }

# Ray turns tokens on by itself only for some ways of starting and joining; a cluster whose parts differ refuses its own.
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
[ -n "${RAY_AUTH_TOKEN_PATH:-}" ] || fail "RAY_AUTH_TOKEN_PATH names no file; make one: (umask 077; od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >FILE)"
[ -s "$RAY_AUTH_TOKEN_PATH" ] || fail "the token file $RAY_AUTH_TOKEN_PATH is empty or not visible here; it must lie on storage that every node sees"
[[ "$(stat -c %a "$RAY_AUTH_TOKEN_PATH")" = [46]00 ]] || fail "others may read $RAY_AUTH_TOKEN_PATH; chmod 600 it"

ulimit -Sn "$(ulimit -Hn)" # Ray holds a socket for each pair of processes

port_base=${RAYLHF_PORT_BASE:-10000}
# Debian gives a host's own name 127.0.1.1, which other nodes would take for themselves.
own_addresses() { getent ahostsv4 "$(hostname)"; hostname -I | tr ' ' '\n'; }
node_ip=${RAYLHF_NODE_IP:-$(own_addresses | awk '/^[0-9.]+ ?/ { if (!/^127\./) { print $1; found = 1; exit } if (!own) own = $1 } END { if (!found) print own }')}
[ -n "$node_ip" ] || fail "this host has no IPv4 address; set RAYLHF_NODE_IP"

num_cpus=${RAYLHF_NUM_CPUS:-${SLURM_CPUS_ON_NODE:-}}
num_gpus=${RAYLHF_NUM_GPUS:-${SLURM_GPUS_ON_NODE:-${SLURM_JOB_ID:+0}}}
object_store_mib=${RAYLHF_OBJECT_STORE_MIB:-}
# Ray would see the whole machine's memory, of which the job has a part.
memory_mib=${RAYLHF_MEMORY_MIB:-${SLURM_MEM_PER_NODE:-}}
[ "${memory_mib:-0}" != 0 ] || memory_mib= # Slurm's 0 is all there is

node_options=(
    "--node-ip-address=$node_ip"
    "--node-manager-port=$((port_base + 1))" "--object-manager-port=$((port_base + 2))"
    "--dashboard-agent-grpc-port=$((port_base + 3))" "--dashboard-agent-listen-port=$((port_base + 4))"
    "--metrics-export-port=$((port_base + 5))" "--runtime-env-agent-port=$((port_base + 6))"
    "--min-worker-port=$((port_base + 10))" "--max-worker-port=$((port_base + 249))"
    --disable-usage-stats --block
)
[ -z "$num_cpus" ] || node_options+=("--num-cpus=$num_cpus")
[ -z "$num_gpus" ] || node_options+=("--num-gpus=$num_gpus")
[ -z "$object_store_mib" ] || node_options+=("--object-store-memory=$((object_store_mib * 1048576))")
[ -z "$memory_mib" ] || node_options+=("--memory=$((memory_mib * 1048576 * 7 / 10))") # the rest is the object store's and the system's
[ -z "${RAYLHF_RESOURCES:-}" ] || node_options+=("--resources=$RAYLHF_RESOURCES")
