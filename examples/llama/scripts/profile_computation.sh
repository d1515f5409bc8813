#!/usr/bin/env bash
# 2. The model's layers on one device, at local batches and tensor-parallel shares: seconds forward, backward, recomputed.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
"$PYTHON" -m galvatron_jax.profilers computation --model "$MODEL" --seq "$SEQ" --dtype "$DTYPE" --base "$HARDWARE" \
  --attention "$ATTENTION" --out "$PROFILE" "${VIRTUAL[@]}" "$@"
