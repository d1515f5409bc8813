"""Runtime: a plan becomes shardings and compiled programs on the devices of a cluster."""

from ._agreement import agree as agree
from ._guard import StepMetrics as StepMetrics
from ._guard import guarded as guarded
from ._guard import step_metrics as step_metrics
from ._layout import LayerLayout as LayerLayout
from ._layout import Role as Role
from ._links import LinkName as LinkName
from ._mesh import StageMesh as StageMesh
from ._mesh import stage_mesh as stage_mesh
from ._model import StageModel as StageModel
from ._model import StageResults as StageResults
from ._model import plan_model as plan_model
from ._model import plan_stages as plan_stages
from ._options import compiler_options as compiler_options
from ._pipeline import PipelinePrograms as PipelinePrograms
from ._placing import UnreadArray as UnreadArray
from ._share import Crossing as Crossing
from ._share import StageShare as StageShare
from ._slots import Slot as Slot
from ._step import StagePrograms as StagePrograms
from ._step import TrainState as TrainState
from ._turns import in_turn as in_turn
