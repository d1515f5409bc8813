"""The flags of the search and their texts: what ``--help`` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROGRAM = "python -m galvatron_jax.search"
FELL_BACK = 6
"""Exit status: the plan that was written is not the best one on paper, which does not fit as compiled."""
INTERRUPTED = 130
DEFAULT_MODEL = "llama2-7b"
DEFAULT_OUT = Path("configs/optimal_solution.json")

EXAMPLES = """\
commands on plan files (each has its own --help):
  explain PLAN [layer N]   why this strategy, what the others would cost, what binds
  diff A B                 where two plans differ, and what that costs
  report PLAN              one HTML page: layers x devices, timeline, memory

examples:
  python -m galvatron_jax.search --mesh 2x8
  python -m galvatron_jax.search --mesh 2x8 --pin "layers 0-3: tp=8" --forbid "remat=full" --explain
  python -m galvatron_jax.search --mesh 1x8,2x8,4x8 --price 2.50
  python -m galvatron_jax.search --mesh 4x8 --gpu h100 --model llama3-70b --global-batch 512,1024 --report report.html
  python -m galvatron_jax.search --mesh 1x8 --gpu a100-40g --memory 34GiB --no-pp --json > plan.json
  python -m galvatron_jax.search explain configs/optimal_solution.json layer 7

exit status: 0 done, 2 bad input, 3 nothing fits the memory, 4 environment, 6 with --verify: done, but the best plan on
paper does not fit as compiled, and another one was written; 130 interrupted (the best plan so far is written)
"""


FLAGS = {
    "what to train, and where": (
        ("--mesh", "NODESxGPUS", "for example 2x8: two nodes of eight GPUs; several meshes (1x8,2x8,4x8) are compared"),
        ("--gpu", "NAME", "a100-40g, a100-80g, h100, h200, b200, cpu (default: what nvidia-smi shows, else h100)"),
        ("--hardware", "FILE", "hardware profile to use instead of a bundled one"),
        ("--profile-from", "TOOL DIR", "measurements of another tool: galvatron, and the folder with its JSON files"),
        ("--memory", "SIZE", "budget per GPU, for example 72GiB (default: capacity less driver, NCCL and slack)"),
        ("--model", "NAME", f"preset, for example llama3-8b (default: {DEFAULT_MODEL})"),
        ("--profile", "FILE", "model profile to use instead of a preset"),
        ("--seq", "N", "sequence length (default: the model's)"),
        ("--dtype", "NAME", "compute dtype: bfloat16, float16, float32 (default: the model's)"),
        ("--attention", "KIND", "fused: a kernel that keeps no scores (cuDNN; 16-bit dtypes), or xla: scores in memory,"
         " where the model does not ask for cuDNN (default: fused where the GPU has it)"),
        ("--global-batch", "N,N,...", "samples per step to choose from (default: the largest three of 1, 2, 4, 8, 16,"
         " 32 per GPU that stay within 16 Mi tokens)"),
    ),
    "what to leave out": (
        ("--space", "NAME", "dp, fsdp, megatron (tp x dp), 3d (with pipeline) or full (default)"),
        ("--pin", "RULE", 'hold layers to strategies, for example "layers 0-3: tp=8" (numbers as in the plan table), '
         '"head: zero=3" or "remat=none|dots"; fields: tp sp ulysses dp zero replicas remat; may be repeated'),
        ("--forbid", "RULE", 'take strategies away, for example "ulysses", "remat=full" or "layers 0-3: tp>2, sp";'
         " may be repeated"),
        ("--microbatches", "N,N,...", "allowed microbatch counts (default: all divisors of the batch)"),
        ("--schedule", "NAME,...", "allowed pipeline schedules: 1f1b, gpipe, interleaved-1f1b (default: all)"),
        ("--max-pp", "N", "most pipeline stages"),
        ("--no-pp", "", "no pipeline: the same as --max-pp 1"),
        ("--max-tp", "N", "largest tensor-parallel degree"),
        ("--time-limit", "SECONDS", "stop then, with the best plan so far and the gap that is proven"),
    ),
    "what to ask beside the plan": (
        ("--explain", "", "why each strategy, what binds, what more memory or links would bring (same schedule)"),
        ("--top", "K", "the best K families of plans: stages, degree of the repeated layers, schedule (the plan's, or"
         " those that --schedule names)"),
        ("--frontier", "", "the fastest plan for each of several smaller memory budgets"),
        ("--price", "NUMBER", "price of one GPU hour: adds tokens per unit of currency"),
        ("--report", "FILE", "one self-contained HTML page"),
        ("--verify", "", "compile the plan with XLA's GPU compiler (no GPU needed; see python -m galvatron_jax.verify);"
         " if it does not fit, search again with less memory, up to 4 plans; write only what fits. Fused attention is"
         " compiled where nvidia-cudnn-cu12 is installed (else --attention xla prices what is compiled)"),
        ("--verify-model", "MODULE:FUNCTION", "with --verify and --profile: the model of the profile, as"
         " python -m galvatron_jax.verify --model takes it"),
    ),
    "output": (
        ("--out", "FILE", f"plan file (default: {DEFAULT_OUT}; with --json or several meshes: none)"),
        ("--force", "", "overwrite --out even if it is not a plan file"),
        ("--json", "", "print JSON, and nothing else, on stdout: the plan document, or what was asked beside it too"),
        ("--quiet", "", "print nothing but errors (and the document with --json)"),
        ("--debug", "", "show the traceback of an error"),
    ),
}  # fmt: skip
"""(flag, name of its value or nothing, help) by group."""

SPECIAL: dict[str, dict[str, Any]] = {
    "--mesh": {"required": True},
    "--pin": {"action": "append", "default": []},
    "--forbid": {"action": "append", "default": []},
    "--profile-from": {"nargs": 2, "metavar": ("TOOL", "DIR")},
}
"""What argparse has to know of some flags besides."""
