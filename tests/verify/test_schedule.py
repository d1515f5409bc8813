"""What a compiled schedule hides: hand-written programs, seconds by hand."""

from __future__ import annotations

import msgspec
import pytest

from galvatron_jax.hardware import load_hardware
from galvatron_jax.profile import CurvePoint, HardwareProfile, Link
from galvatron_jax.verify._schedule import ScheduledCollective, scheduled_collectives

GATHER_BYTES, PRODUCT_FLOPS = 4 * 2**20, 2 * 512 * 512 * 256


@pytest.fixture(scope="module")
def hardware() -> HardwareProfile:
    """A collective of ``GATHER_BYTES`` over two takes 2 s, a product of ``PRODUCT_FLOPS`` 1 s, traffic nothing."""
    return msgspec.structs.replace(
        load_hardware("h100"),
        matmul_flops_per_s={"bfloat16": float(PRODUCT_FLOPS)},
        matmul_efficiency=(CurvePoint(flops=1.0, efficiency=1.0),),
        intra_node=Link(bandwidth_bytes_per_s=GATHER_BYTES / 4, latency_s=0.0),
        memory_bandwidth_bytes_per_s=1e20,
        kernel_launch_s=0.0,
    )


def program(*lines: str) -> str:
    return "\n".join(
        [
            "%product (a: bf16[512,256], b: bf16[256,512]) -> bf16[512,512] {",
            "  %a = bf16[512,256]{1,0} parameter(0)",
            "  %b = bf16[256,512]{1,0} parameter(1)",
            "  ROOT %dot = bf16[512,512]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            "}",
            "",
            "ENTRY %main (x: bf16[512,256]) -> bf16[512,512] {",
            "  %x = bf16[512,256]{1,0} parameter(0)",
            "  %y = bf16[256,512]{1,0} parameter(1)",
            *[f"  {line}" for line in lines],
            "}",
        ]
    )


def start(name: str) -> str:
    whole = f"f32[{GATHER_BYTES // 4}]"
    return f"%{name} = (f32[{GATHER_BYTES // 8}]{{0}}, {whole}{{0}}) all-gather-start(%p), replica_groups={{{{0,1}}}}"


def done(name: str) -> str:
    return f"%{name}.done = f32[{GATHER_BYTES // 4}]{{0}} all-gather-done(%{name})"


def product(name: str) -> str:
    return f"%{name} = bf16[512,512]{{1,0}} fusion(%x, %y), kind=kCustom, calls=%product"


def schedule(hardware: HardwareProfile, *lines: str) -> list[ScheduledCollective]:
    return scheduled_collectives(program(*lines), hardware, devices=2, gpus_per_node=2)


def test_product_between_start_and_end_hides_its_seconds(hardware: HardwareProfile) -> None:
    (found,) = schedule(hardware, start("g"), product("f"), done("g"))
    assert (found.asynchronous, found.products_beside) == (True, 1)
    assert (found.seconds, found.exposed_s) == pytest.approx((2.0, 1.0))


def test_more_work_than_communication_hides_all_of_it(hardware: HardwareProfile) -> None:
    (found,) = schedule(hardware, start("g"), product("f"), product("f2"), product("f3"), done("g"))
    assert found.exposed_s == 0.0


def test_work_before_the_start_and_after_the_end_hides_nothing(hardware: HardwareProfile) -> None:
    (found,) = schedule(hardware, product("f"), start("g"), done("g"), product("f2"))
    assert found.products_beside == 0
    assert found.exposed_s == pytest.approx(2.0)


def test_two_collectives_share_the_work_the_first_one_first(hardware: HardwareProfile) -> None:
    lines = [start("g"), start("h"), product("a"), product("b"), product("c"), done("g"), done("h")]
    first, second = schedule(hardware, *lines)
    assert (first.exposed_s, second.exposed_s) == pytest.approx((0.0, 1.0))


def test_synchronous_collective_hides_nothing(hardware: HardwareProfile) -> None:
    line = f"%r = f32[{GATHER_BYTES // 4}]{{0}} all-reduce(%p), replica_groups={{{{0,1}}}}, to_apply=%add"
    (found,) = schedule(hardware, product("f"), line, product("f2"))
    assert (found.asynchronous, found.exposed_s) == (False, found.seconds)


def test_collective_wrapped_by_an_async_start_is_found_once_in_its_place(hardware: HardwareProfile) -> None:
    wrapped = f"""\
%wrapped (q: f32[{GATHER_BYTES // 8}]) -> f32[{GATHER_BYTES // 4}] {{
  ROOT %inner = f32[{GATHER_BYTES // 4}]{{0}} all-gather(%q), replica_groups={{{{0,1}}}}, dimensions={{0}}
}}

"""
    begin = f"%s = ((f32[2]), f32[{GATHER_BYTES // 4}]{{0}}, u32[]) async-start(%p), calls=%wrapped"
    end = f"%e = f32[{GATHER_BYTES // 4}]{{0}} async-done(%s)"
    (found,) = scheduled_collectives(wrapped + program(begin, product("f"), end), hardware, devices=2, gpus_per_node=2)
    assert (found.asynchronous, found.products_beside) == (True, 1)
    assert found.exposed_s == pytest.approx(1.0)


def test_collective_that_names_no_groups_is_of_all_devices(hardware: HardwareProfile) -> None:
    line = f"%r = f32[{GATHER_BYTES // 4}]{{0}} all-gather(%p), replica_groups={{}}, dimensions={{0}}"
    (found,) = schedule(hardware, line)
    assert found.seconds == pytest.approx(2.0)
