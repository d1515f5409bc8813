#!/usr/bin/env bash
# 5. What the plan should cost, layer by layer and stage by stage; with --measure it is run on the devices here and the
#    errors are shown. `--trace step.json` writes the predicted step for ui.perfetto.dev.
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
if [ -f "$HARDWARE" ]; then HARDWARE_FROM=(--hardware "$HARDWARE"); else HARDWARE_FROM=(); fi
if [ -f "$PROFILE" ]; then MODEL_FROM=(--profile "$PROFILE"); else MODEL_FROM=(); fi
$LAUNCH "$PYTHON" -m galvatron_jax.cost "$PLAN" "${HARDWARE_FROM[@]}" "${MODEL_FROM[@]}" --attention "$ATTENTION" \
  "${VIRTUAL[@]}" "$@"
