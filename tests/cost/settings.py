"""Settings and strategies that the tests of this room share."""

from __future__ import annotations

from hypothesis import strategies as st

from galvatron_jax.cluster import Cluster
from galvatron_jax.cost import Setting
from galvatron_jax.plan import Strategy, Training
from galvatron_jax.profile import HardwareProfile, ModelProfile
from tests.support.toy_models import llama_like_profile, toy_hardware

MODEL: ModelProfile = llama_like_profile(
    layers=4, embed=64, heads=8, head_dim=8, mlp=128, vocab=256, seq=32, kv_heads=8, name="cost"
)
HARDWARE: HardwareProfile = toy_hardware()
KINDS = [kind.name for kind in MODEL.kinds]


def setting(
    devices: int = 8, *, microbatch: int = 16, microbatches: int = 1, hardware: HardwareProfile = HARDWARE
) -> Setting:
    """A stage of ``devices`` devices on nodes of 4."""
    return Setting(
        hardware=hardware,
        cluster=Cluster(nodes=max(1, devices // 4), gpus_per_node=min(4, devices), gpu="toy"),
        stage_devices=devices,
        microbatch=microbatch,
        microbatches=microbatches,
        training=Training(),
        causal_attention=True,
    )


def legal_strategies(devices: int = 8) -> list[Strategy]:
    """Every legal strategy on ``devices`` devices (a power of two, at most 8)."""
    return [
        Strategy(tp=tp, sp=sp, dp=devices // tp, zero=zero, remat=remat)
        for tp in (1, 2, 4, 8)
        if devices % tp == 0
        for sp in (False, True)[: 1 + (tp > 1)]
        for zero in range(4 if devices > tp else 1)
        for remat in ("none", "full")
    ]


strategies = st.sampled_from(legal_strategies())
