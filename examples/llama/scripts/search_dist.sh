#!/usr/bin/env bash
# 4. The fastest plan for these devices and this model, with its proof: configs/optimal_solution.json. Needs no device.
#    Uses what steps 1 to 3 measured; without their files, bundled data sheets and the model's formulas.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
if [ -f "$HARDWARE" ]; then HARDWARE_FROM=(--hardware "$HARDWARE"); else HARDWARE_FROM=(); fi
if [ -f "$PROFILE" ]; then MODEL_FROM=(--profile "$PROFILE"); else MODEL_FROM=(--model "$MODEL" --seq "$SEQ"); fi
"$PYTHON" -m galvatron_jax.search --mesh "$MESH" "${MODEL_FROM[@]}" --dtype "$DTYPE" "${HARDWARE_FROM[@]}" \
  --global-batch "$GLOBAL_BATCH" --attention "$ATTENTION" --out "$PLAN" "$@"
