#!/usr/bin/env bash
# Joins this node to the Ray cluster at RAYLHF_HEAD (host:port), and stays until that ends. Settings: see ray_node.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_node.sh"
[ -n "${RAYLHF_HEAD:-}" ] || fail "RAYLHF_HEAD is not set; give the head's host:port"
host=${RAYLHF_HEAD%:*} port=${RAYLHF_HEAD##*:}
deadline=$((SECONDS + ${RAYLHF_START_TIMEOUT_S:-600}))
until (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; do
    [ "$SECONDS" -lt "$deadline" ] || fail "no Ray head answers at $RAYLHF_HEAD within ${RAYLHF_START_TIMEOUT_S:-600} s"
    sleep 0.5
done
# A worker whose head is gone ends soon, so that the allocation is free for the next try.
export RAY_gcs_rpc_server_reconnect_timeout_s=${RAY_gcs_rpc_server_reconnect_timeout_s:-30}
exec ray start "--address=$RAYLHF_HEAD" "${node_options[@]}"
