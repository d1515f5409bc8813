#!/usr/bin/env bash
# 6. Train by the plan. Stopped or killed, the same command goes on from the last checkpoint; a supervisor starts the
#    processes again after a failure. On several machines one process each: LAUNCH=srun bash .../train_dist.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
$LAUNCH "$PYTHON" -m galvatron_jax.train.launch --restarts "${RESTARTS:-3}" "$RUN" --plan "$PLAN" "${VIRTUAL[@]}" "$@"
