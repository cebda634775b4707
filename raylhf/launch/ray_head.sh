#!/usr/bin/env bash
# Starts the head of a Ray cluster on this node, and stays until it ends. Settings: see ray_node.sh.
# The dashboard listens on this node alone; reach it through ssh -L.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ray_node.sh"
exec ray start --head "--port=$port_base" --ray-client-server-port="$((port_base + 7))" \
    --include-dashboard="${RAYLHF_DASHBOARD:-true}" --dashboard-host=127.0.0.1 --dashboard-port="$((port_base + 8))" \
    "${node_options[@]}"
