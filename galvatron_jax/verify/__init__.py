"""Verify: read what the compiler made of a plan, to hold it against what was predicted."""

from ._groups import Groups as Groups
from ._hlo import HloCollective as HloCollective
from ._hlo import collectives as collectives
