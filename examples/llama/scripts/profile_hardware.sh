#!/usr/bin/env bash
# 1. Clocks on the devices: collectives over every group that a strategy can use, products, copies, launches, overlap.
#    On several machines one process each: LAUNCH=srun bash examples/llama/scripts/profile_hardware.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
$LAUNCH "$PYTHON" -m galvatron_jax.profilers hardware --mesh "$MESH" --out "$HARDWARE" "${VIRTUAL[@]}" "$@"
