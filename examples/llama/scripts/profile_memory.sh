#!/usr/bin/env bash
# 3. The model's layers as XLA compiles them for the cluster's GPUs, which need not be there: bytes that each layer keeps,
#    and workspace, by strategy and local batch. Joins the same profile. Needs the extra [verify].
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
"$PYTHON" -m galvatron_jax.profilers memory --model "$MODEL" --seq "$SEQ" --dtype "$DTYPE" --mesh "$MESH" --gpu "$GPU" \
  --attention "$ATTENTION" --out "$PROFILE" "$@"
