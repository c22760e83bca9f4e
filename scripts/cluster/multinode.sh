#!/usr/bin/env bash
# One training over several machines. Run this on each of them, with the same flags of train.py:
#
#   NNODES=2 NODE_RANK=R MASTER_ADDR=HOST bash scripts/cluster/multinode.sh [flags]     R = 0 on HOST, 1 on the other machine
#   NNODES=2 RDZV_ENDPOINT=HOST:29500 RDZV_ID=NAME bash scripts/cluster/multinode.sh [flags]
#                                      c10d: the nodes number themselves; HOST is one of them, NAME new for every job
#
# Further variables, all optional:
#   NPROC           ranks on this node: one a GPU, or 2 where there is none
#   MASTER_PORT     29500; the ranks open further ports of their own, so the nodes must trust one another
#   MAX_RESTARTS    0: how often torchrun may start all ranks anew after one has failed (c10d only). Needs --run-name, and
#                   adds --resume auto: they go on from the newest checkpoint
#   JOIN_S          600: seconds that a node waits for the others
#   IFNAME          interface between the nodes: the one on the way to HOST. Sets GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME
#   NCCL_IB_HCA, NCCL_DEBUG=INFO, ...   reach NCCL as they are
#
# Installs what is missing, checks the flags and fetches the data on each node. --out must be a folder that all nodes
# share; --data-dir may be one, or each node's own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$root/scripts/setup.sh"

number() { # NAME: its value must be a number
    [[ ${!1} =~ ^[0-9]+$ ]] || die "$1=${!1} is not a number"
}

NNODES=${NNODES:-} MASTER_PORT=${MASTER_PORT:-29500} MAX_RESTARTS=${MAX_RESTARTS:-0} JOIN_S=${JOIN_S:-600}
[ -n "$NNODES" ] || die "how many machines? NNODES=2 (on one machine: scripts/train.sh)"
for name in NNODES MASTER_PORT MAX_RESTARTS JOIN_S; do number "$name"; done
[ "$NNODES" -gt 0 ] || die "NNODES=$NNODES: must be at least 1"
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    [ -z "${NODE_RANK:-}${MASTER_ADDR:-}" ] || die "NODE_RANK and MASTER_ADDR, or RDZV_ENDPOINT and RDZV_ID: not both"
    [ -n "${RDZV_ID:-}" ] || die "RDZV_ENDPOINT needs RDZV_ID, a name that all nodes of this job give, and no other job"
    endpoint=$RDZV_ENDPOINT
else
    [ -n "${MASTER_ADDR:-}" ] || die "where do the nodes meet? MASTER_ADDR=HOST, or RDZV_ENDPOINT=HOST:PORT"
    [ -n "${NODE_RANK:-}" ] || die "which node is this? NODE_RANK=0 on $MASTER_ADDR, then 1 to $((NNODES - 1))"
    number NODE_RANK
    [ "$NODE_RANK" -lt "$NNODES" ] || die "NODE_RANK=$NODE_RANK must be below NNODES=$NNODES"
    # torchrun's static store keeps the ranks' addresses of the attempt before.
    [ "$MAX_RESTARTS" -eq 0 ] || die "MAX_RESTARTS=$MAX_RESTARTS needs RDZV_ENDPOINT and RDZV_ID, not NODE_RANK"
    endpoint=$MASTER_ADDR:$MASTER_PORT
fi
if [ "$MAX_RESTARTS" -gt 0 ]; then
    [[ " $*" =~ \ --run[-_]name[\ =] ]] || die "MAX_RESTARTS=$MAX_RESTARTS needs --run-name, the run to go on with"
    [[ " $*" =~ \ --resume[\ =] ]] || set -- "$@" --resume auto
fi

setup "$root" requirements.txt
count_ranks
WORLD_SIZE=$((NNODES * ranks)) "$PYTHON" "$root/train.py" --check "$@"
for flag in "$@"; do
    case $flag in --help | -h | --check) exit ;; esac
done
share_cores

way=("$endpoint" ${IFNAME:+--ifname "$IFNAME"})
[ "${NODE_RANK:-}" = 0 ] || way+=(--wait "$JOIN_S") # node 0 is who the others wait for
read -r address interface part <<<"$(cd "$root" && "$PYTHON" -m scripts.cluster.interface "${way[@]}")"
[ -n "$interface" ] || exit 2
export GLOO_SOCKET_IFNAME=${IFNAME:-${GLOO_SOCKET_IFNAME:-$interface}}
[ -z "${IFNAME:-}" ] || export NCCL_SOCKET_IFNAME="=$IFNAME" # else NCCL's own choice, which prefers InfiniBand
# torchrun and not `accelerate launch`: that one has no --local_addr and no --rdzv_id, and train.py takes nothing else
# from it.
elastic=(--nnodes "$NNODES" --nproc_per_node "$ranks" --max_restarts "$MAX_RESTARTS")
if [ -n "${RDZV_ENDPOINT:-}" ]; then
    elastic+=(--rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "$RDZV_ID" --local_addr "$address")
    # Who hosts the store: torch's own guess goes by names. On loopback, with several "nodes" on a machine, it is right.
    [ "$interface" = lo ] || hosts=,is_host=$([ "$part" = host ] && echo 1 || echo 0)
    elastic+=(--rdzv_conf "join_timeout=$JOIN_S${hosts:-}")
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else a restart may meet the last attempt's addresses: pytorch/135712
else
    elastic+=(--node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    elastic+=(--rdzv_conf "timeout=$JOIN_S")
fi
echo "$0: $ranks rank(s) at $address ($interface); waiting up to $JOIN_S s for $NNODES node(s) at $endpoint" >&2
exec "$PYTHON" -m torch.distributed.run "${elastic[@]}" "$root/train.py" "$@"
