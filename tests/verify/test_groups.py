from __future__ import annotations

import pytest

from galvatron_jax.verify import Groups
from galvatron_jax.verify._groups import device_groups

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", PAIRS),
        ("replica_groups=[4,2]<=[8]", PAIRS),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", PAIRS),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", PAIRS),
        # every fourth device
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        # every second one inside each half
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        # the order in a group is the order of the axes
        ("replica_groups=mesh['a'=2,'b'=2] {'b', 'a'}", ((0, 2, 1, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a', 'b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=8] {'a':(1)2, 'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # a mesh that numbers its devices by columns
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
        ("channel_id=3, to_apply=%add", ()),
    ],
)
def test_device_groups_in_each_spelling(text: str, groups: Groups) -> None:
    line = f"  %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {text}, use_global_device_ids=true"
    assert device_groups(line) == groups
