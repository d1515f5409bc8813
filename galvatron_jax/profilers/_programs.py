"""From a subject to the program that measures it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax

from ._agenda import KINDS, OVERLAP_SIDE
from ._collectives import collective_loop
from ._compute import copy_loop, launch_loop, overlap_loop, product_loop
from ._host import program_loop
from ._loop import Loop, platform_of
from ._messages import message_loop, sender_loop
from ._readings import (
    COPY,
    LAUNCH,
    LOOP,
    MATMUL,
    MESSAGE,
    OVERLAP,
    PROGRAM,
    SENDER,
    Reading,
    Subject,
    overlap_parts,
    product_side,
    sender_parts,
)
from ._timing import MeasurementError

_LAUNCHES = 32

_COMPUTE_SHARE = 2.0
"""Products beside an all-reduce take about twice its time: it is hidden, if anything hides it."""

_LONGER = 1.25
"""Products after a message take so many times its time: more than it, whatever both vary by."""

_MOST_PRODUCTS = 64
"""More would only make a larger program."""


def subject_loop(subject: Subject, readings: Mapping[Subject, Reading], devices: Sequence[jax.Device]) -> Loop:
    """Return the compiled program that measures ``subject`` on ``devices`` (node-major).

    Args:
        subject: From the agenda.
        readings: What is known by now: it decides how many products stand beside an all-reduce.
        devices: All devices of the mesh.

    Raises:
        MeasurementError: there is no such program, see ``collective_loop`` and ``overlap_loop``.
    """
    for kind in KINDS:
        if subject.what == kind:
            return collective_loop(kind, subject.size, devices, group=subject.group, stride=subject.stride)
    if subject.what == MESSAGE:
        return message_loop(subject.size, devices, nodes=subject.group, per_node=subject.stride)
    if subject.what == SENDER:
        side = OVERLAP_SIDE[platform_of(devices)]
        return sender_loop(
            subject.size,
            side,
            subject.dtype,
            devices,
            nodes=subject.group,
            per_node=subject.stride,
            products=_products_after(subject, side, readings),
        )
    if subject.what in (LOOP, LAUNCH):
        return launch_loop(devices, 1 if subject.what == LOOP else _LAUNCHES)
    if subject.what == PROGRAM:
        return program_loop(devices)
    if subject.what == COPY:
        return copy_loop(subject.size, devices)
    if subject.what == MATMUL:
        return product_loop(product_side(subject.size), subject.dtype, devices)
    assert subject.what == OVERLAP, subject
    side = OVERLAP_SIDE[platform_of(devices)]
    products = _products_beside(subject, side, readings)
    return overlap_loop(subject.size, side, subject.dtype, devices, group=subject.group, products=products)


def _products_beside(subject: Subject, side: int, readings: Mapping[Subject, Reading]) -> int:
    parts = overlap_parts(subject, side, readings)
    if parts is None:
        raise MeasurementError("the all-reduce or the product alone was not measured", action="skipped")
    alone, product = parts
    return min(_MOST_PRODUCTS, math.ceil(_COMPUTE_SHARE * alone.seconds / product.seconds))


def _products_after(subject: Subject, side: int, readings: Mapping[Subject, Reading]) -> int:
    parts = sender_parts(subject, side, readings)
    if parts is None:
        raise MeasurementError("the message or the product alone was not measured", action="skipped")
    message, _, product = parts
    return math.ceil(_LONGER * message.seconds / product.seconds)
