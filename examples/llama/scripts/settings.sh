# What all scripts of the example share; sourced, not run. Every setting is an environment variable with a default:
#
#   MODEL=llama2-7b MESH=2x8 bash examples/llama/scripts/search_dist.sh
#
# DEVICES=8 uses 8 virtual CPU devices, so that the whole workflow can be tried on a laptop. LAUNCH is put before every
# command that uses several machines' devices: `srun` inside a SLURM allocation, `mpirun -hostfile hosts`, or nothing.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."

PYTHON=${PYTHON:-.venv/bin/python}
LAUNCH=${LAUNCH:-}
DEVICES=${DEVICES:-}
CONFIGS=${CONFIGS:-configs}
GPU=${GPU:-h100}  # whose compiler memory is asked of; no such GPU needs to be here
HARDWARE=$CONFIGS/hardware.json
PROFILE=$CONFIGS/model.json
PLAN=$CONFIGS/optimal_solution.json
if [ -n "$DEVICES" ]; then
  MODEL=${MODEL:-llama-tiny} MESH=${MESH:-1x$DEVICES} SEQ=${SEQ:-128} GLOBAL_BATCH=${GLOBAL_BATCH:-32}
  DTYPE=${DTYPE:-float32}  # CPUs emulate bfloat16, many times slower
  ATTENTION=${ATTENTION:-xla}  # no fused kernel runs on CPUs
  RUN=${RUN:-examples/llama/configs/tiny.toml}
else
  MODEL=${MODEL:-llama2-7b} MESH=${MESH:-2x8} SEQ=${SEQ:-4096} GLOBAL_BATCH=${GLOBAL_BATCH:-128,256,512}
  DTYPE=${DTYPE:-bfloat16}
  ATTENTION=${ATTENTION:-fused}  # llama2_7b.toml asks for cuDNN's kernel
  RUN=${RUN:-examples/llama/configs/llama2_7b.toml}
fi
VIRTUAL=(${DEVICES:+--devices "$DEVICES"})
mkdir -p "$CONFIGS"
