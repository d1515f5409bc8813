"""Verify: read what the compiler made of a plan, to hold it against what was predicted."""

from ._compile import check_toolchain as check_toolchain
from ._groups import Groups as Groups
from ._hlo import HloCollective as HloCollective
from ._hlo import collectives as collectives
from ._target import target_names as target_names
from ._verification import StageCheck as StageCheck
from ._verification import Verification as Verification
from ._verification import verify_plan as verify_plan
