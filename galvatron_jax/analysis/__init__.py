"""Analysis: the user's loss function becomes layers, shardable dimensions, candidates and quantities. No devices."""

from . import _rules as _rules  # registers the dimension rules
from . import _rules_parts as _rules_parts
from ._batch import abstract_batch as abstract_batch
from ._batch import disagreeing_samples as disagreeing_samples
from ._batch import sample_count as sample_count
from ._cut import Segment as Segment
from ._dimensions import Rule as Rule
from ._dimensions import Value as Value
from ._dimensions import register_rule as register_rule
from ._flatten import Equation as Equation
from ._flatten import Program as Program
from ._flatten import Variable as Variable
from ._flatten import flatten as flatten
from ._flatten import is_call as is_call
from ._jaxpr import abstract as abstract
from ._jaxpr import run_equation as run_equation
from ._kind import AnalysedKind as AnalysedKind
from ._local import LocalLayer as LocalLayer
from ._local import local_layer as local_layer
from ._per_sample import refused_parameters as refused_parameters
from ._primitives import ELEMENTWISE as ELEMENTWISE
from ._primitives import REDUCTIONS as REDUCTIONS
from ._primitives import is_batched as is_batched
from ._primitives import is_kept as is_kept
from ._primitives import is_kernel_name as is_kernel_name
from ._profile import Analysis as Analysis
from ._profile import analyse_model as analyse_model
from ._profile import trained_variables as trained_variables
from ._pure_model import Loss as Loss
from ._pure_model import PureModel as PureModel
from ._read_nnx import split_parameters as split_parameters
from ._report import analysis_lines as analysis_lines
from ._rows import Rows as Rows
from ._rows import Stack as Stack
from ._rules import register_rule_text as register_rule_text
from ._shorten import shorten as shorten
