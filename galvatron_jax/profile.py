"""Profiles: what the search knows about the hardware and about the model.

A ``ModelProfile`` describes each layer kind by *arrays whose sizes are monomials over named classes*: the query of a
Llama block is ``("batch", "seq", "heads", "head_dim")``. Two dimensions share a class when the analysis proved that
they hold the same index space. So one profile answers every batch, sequence length and sharding:

    local bytes = itemsize * factor * product over classes of size(class) / shards(class)

A class that occurs twice in one array (``seq`` in attention scores) is divided once only: a mesh axis can shard only
one of the two dimensions.

A ``HardwareProfile`` holds ceilings (FLOP/s, bytes/s), an efficiency curve and links, each with its source; tables
measured by the profilers replace the formulas where they are present, in either profile, and ``Provenance`` says on
which devices a clock ran, so that figures of one machine never price another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec

from ._document import Bytes as Bytes
from ._document import Count as Count
from ._document import Document, Value
from ._document import Fraction as Fraction
from ._document import NonNegative as NonNegative
from ._document import Positive as Positive
from ._hardware_profile import CollectiveKind as CollectiveKind
from ._hardware_profile import CollectiveTable as CollectiveTable
from ._hardware_profile import CurvePoint as CurvePoint
from ._hardware_profile import HardwareProfile as HardwareProfile
from ._hardware_profile import Link as Link
from ._hardware_profile import Phase as Phase
from .measured import Measured, MeasuredMemory
from .units import ITEM_BYTES

BATCH, SEQ = "batch", "seq"
"""The two class names with a meaning of their own: samples of the (micro)batch, and positions in a sequence."""


# ------------------------------------------------------------------------------------------------------------- model
class Array(Value, frozen=True, kw_only=True, omit_defaults=True):
    """``count`` arrays of one size, as a monomial over classes."""

    dtype: str
    classes: tuple[str, ...] = ()
    factor: Count = 1
    """Elements that no class divides (for example the 2 halves of a rotary embedding)."""
    count: Count = 1
    attention: bool = False
    """Inside an attention call: a fused attention kernel never writes it to memory."""

    def elements(self, sizes: Mapping[str, int], shards: Mapping[str, int]) -> float:
        """Elements on one device, all ``count`` arrays together.

        Args:
            sizes: Size of each class.
            shards: Number of shards of each sharded class; a class not named is whole.
        """
        whole = math.prod(sizes[name] for name in self.classes)
        return self.count * self.factor * whole / math.prod(shards.get(name, 1) for name in set(self.classes))

    def local_bytes(self, sizes: Mapping[str, int], shards: Mapping[str, int]) -> float:
        """Bytes on one device, all ``count`` arrays together."""
        return ITEM_BYTES[self.dtype] * self.elements(sizes, shards)


class Lookup(Value, frozen=True, kw_only=True):
    """One lookup in a table: what its gradient scatters into the table's."""

    rows: Array
    """On the narrow side of a cast: in this dtype they move."""
    indices: Array


class Parameter(Value, frozen=True, kw_only=True, omit_defaults=True):
    """One parameter array of a layer kind."""

    path: str
    """Path inside the layer, for example ``"attention.query.kernel"``."""
    dtype: str
    """Storage (master) dtype."""
    compute_dtype: str
    """Dtype in which every use reads it: gathers move this dtype when the cast comes first."""
    dims: tuple[tuple[str | int, ...], ...]
    """Factors of each dimension, major to minor: class names, or sizes that must not be sharded."""
    tied: bool = False
    """A layer before holds the same array (a tied embedding table, a shared block): a stage keeps it once, and it
    counts once as a parameter of the model."""
    reread: tuple[Literal["none", "dots", "full"], ...] = ("none", "dots", "full")
    """Remat policies under which the backward pass reads it, so that zero 3 gathers it again (no lookup's table)."""
    sums: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Partial results over the batch that its gradient adds up. Each is reduced for itself, or their sum once where the
    compiler merges; 0: what it is made from is reduced already (``LayerKind.data``)."""
    per_sample: bool = True
    """Every use treats all samples alike, so that ranks can sum up gradients of their own over microbatches, and groups
    of hsdp theirs, before they meet. The gradient of any other one (of a convolution) is reduced over all ranks where
    it is made."""
    lookups: tuple[Lookup, ...] = ()
    """Those of the partial results that are lookups': where a compiler may choose, it moves the rows in place of the
    table."""

    def classes(self) -> tuple[str, ...]:
        """All class names in all dimensions."""
        return tuple(f for dim in self.dims for f in dim if isinstance(f, str))

    def array(self, dtype: str | None = None) -> Array:
        """The parameter as an ``Array``, in ``dtype`` (default: the storage dtype)."""
        factor = math.prod(f for dim in self.dims for f in dim if isinstance(f, int))
        return Array(dtype=dtype or self.dtype, classes=self.classes(), factor=factor)


class Dot(Value, frozen=True, kw_only=True, omit_defaults=True):
    """``count`` equal matrix products (or convolutions); FLOPs = 2 * factor * product of all its classes."""

    phase: Phase
    dtype: str
    classes: tuple[str, ...]
    """Batch, free and contracted classes together."""
    factor: Count = 1
    count: Count = 1
    attention: bool = False
    """Scores or mixing product of an attention call: causal attention needs half of it."""
    recomputed: bool = True
    """A forward product that full rematerialisation runs again; False when nothing in the backward pass needs its
    result (the last product of a block), so that its recomputation is dead code."""
    batched: bool = False
    """A product of two activations (it has batch dimensions): remat ``dots`` does not keep its result, so it runs
    again there too when ``recomputed``."""

    def flops(self, sizes: Mapping[str, int], shards: Mapping[str, int]) -> float:
        """FLOP of *one* of the ``count`` products on one device."""
        whole = math.prod(sizes[name] for name in self.classes)
        return 2 * self.factor * whole / math.prod(shards.get(name, 1) for name in set(self.classes))


class Traffic(Value, frozen=True, kw_only=True, omit_defaults=True):
    """Arrays that memory-bound kernels (norms, softmax, activations, residual adds) read or write once."""

    phase: Phase
    array: Array


class Collective(Value, frozen=True, kw_only=True, omit_defaults=True):
    """``array.count`` collectives per microbatch that a sharded class causes."""

    phase: Phase
    kind: CollectiveKind
    array: Array
    """Whole array of the group: result of all-reduce and all-gather, operand of reduce-scatter (local otherwise); what
    it has of sharded classes that it does not sum over is local."""
    merged_count: Annotated[int, msgspec.Meta(ge=0)]
    """How many are left when the compiler sums partial results before it reduces (XLA:GPU, AllReduceReassociate)."""
    over: tuple[str, ...] = ()
    """The classes it sums over: its group has the product of their shards, and there is none where nothing of them is
    sharded. Empty for gathers and exchanges: their group is all ranks that shard the layer's classes."""
    recomputed: bool = False
    """A forward collective that full rematerialisation runs again."""
    recomputed_dots: bool = False
    """A forward collective that remat ``dots`` runs again."""
    gradient: bool = False
    """What it sums over the batch goes into gradients of parameters alone, all of them ``per_sample`` (positions of a
    table): it is part of their reduction, and stays inside a group of hsdp as they do."""


class Candidate(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A set of classes which, sharded together over the tensor axes, divides the layer's work."""

    classes: tuple[str, ...]
    max_degree: Count
    """Greatest common divisor of the class sizes: the degree must divide it."""
    flops_share: Fraction
    """Share of the layer's matmul FLOPs that the set divides."""
    spill: dict[str, str] = {}
    """Class -> class of another dimension that takes the rest of a degree greater than the first one's size: kv heads
    spill into the query heads of a group (GQA with tp > kv heads; keys and values are then copied)."""
    tensor: tuple[Collective, ...]
    """Collectives with the stream replicated over the tensor axes."""
    sequence: tuple[Collective, ...] | None = None
    """Collectives with the stream sharded along ``seq`` between the products (Megatron sp); None: not legal."""
    spilled: tuple[Collective, ...] = ()
    """In place of ``tensor`` where the degree spills."""

    def collectives(self, degree: int, sizes: Mapping[str, int], *, sp: bool) -> tuple[Collective, ...]:
        """Return the collectives of tensor parallelism of ``degree``, with or without sequence parallelism."""
        if sp:
            return self.sequence or ()
        return self.spilled if self.spills(degree, sizes) else self.tensor

    def spills(self, degree: int, sizes: Mapping[str, int]) -> bool:
        """Tell whether ``degree`` is more than the classes themselves can take."""
        return any(rest in self.shards(degree, sizes) for rest in self.spill.values())

    def shards(self, degree: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return how many shards each class has under tensor parallelism of ``degree`` (all 1 for degree 1)."""
        found = {}
        for name in self.classes:
            rest = self.spill.get(name)
            found[name] = degree if rest is None else math.gcd(degree, sizes[name])
            if rest is not None and degree > found[name]:
                found[rest] = degree // found[name]
        return found

    def undivided(self, sizes: Mapping[str, int], degree: int) -> list[str]:
        """Return the classes that ``degree`` does not divide; a class that spills must be divided to the last index."""
        shards = self.shards(degree, sizes)
        return [
            name
            for name, count in shards.items()
            if sizes[name] % count or (name in self.spill and count < min(degree, sizes[name]))
        ]


class Ulysses(Value, frozen=True, kw_only=True):
    """What Ulysses sequence parallelism does in a layer: all but attention is sharded along ``seq``."""

    classes: tuple[str, ...] = ()
    """Classes sharded in place of ``seq`` inside attention (heads); none in a layer without attention."""
    collectives: tuple[Collective, ...] = ()
    """Per microbatch; what is summed over ``batch`` too is left out (``LayerKind.data``, gradients of parameters).
    Exchanged arrays are local: divided by the shards of ``batch`` and once by the degree."""
    unread: tuple[str, ...] = ()
    """Paths of parameters that the backward pass does not read under remat ``none``, since what they make (biases of
    queries, keys and values) is exchanged and kept."""


class Boundary(Value, frozen=True, kw_only=True, omit_defaults=True):
    """A value that enters or leaves a layer."""

    array: Array
    gradient: bool
    """Its cotangent flows back."""
    stream: bool = False
    """It comes from the layer before (or goes to the next): not a mask or table shared by all layers."""
    recomputed: bool = False
    """It depends on the batch alone, not on parameters (a mask, positions, a rotary table): every pipeline stage makes
    it again in place of receiving it."""
    value: str = ""
    """Which value of the program it is, beside the stream and where all layers of the kind have the same one: equal
    names in several kinds are one array (tokens that embedding and head read, an encoder's output)."""


class Moment(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What is alive at one moment of a layer's backward pass, besides what the forward pass kept."""

    arrays: tuple[Array, ...] = ()
    weights: tuple[Array, ...] = ()
    """Parameters, as the layer uses them, that are still to be read: where zero 3 gathers them, they may be here."""


class Live(Value, frozen=True, kw_only=True, omit_defaults=True):
    """What a layer needs during its backward pass under one remat policy, as the compiler schedules and fuses it."""

    moments: tuple[Moment, ...] = ()
    """The fullest ones, each under another sharding or kernel: the largest counts."""
    prefetched: tuple[Array, ...] = ()
    """Weights of the next layer that zero 3 gathers meanwhile, in a loop over layers."""
    waiting: tuple[Array, ...] = ()
    """Operands of the weights' gradients. These are computed last, so that what a layer outside a loop holds for them
    stays alive while the layers before it run."""


class LayerKind(Value, frozen=True, kw_only=True):
    """Layers with the same structure: everything the cost of one of them depends on."""

    name: str
    classes: dict[str, Count]
    """Size of each class at the traced shape; ``batch`` is rescaled by whoever prices the layer."""
    parameters: tuple[Parameter, ...]
    dots: tuple[Dot, ...]
    traffic: tuple[Traffic, ...]
    inputs: tuple[Boundary, ...]
    outputs: tuple[Boundary, ...]
    residuals: tuple[Array, ...]
    """What the forward pass keeps for the backward pass without remat: neither parameters nor the stream input."""
    workspace: tuple[Array, ...]
    """Arrays alive at the worst moment of the backward pass besides residuals, parameters and their gradients, by
    operations alone; ``live`` says more."""
    live: dict[Literal["none", "dots", "full"], Live] = {}
    """By remat policy; without it (a profile written by hand) the workspace, and residuals that are made again, add up
    to what a layer needs."""
    repeated: bool = True
    """Layers of this kind stand in a row, so that they run as a loop; an embedding or a head stands alone."""
    residuals_dots: tuple[Array, ...] | None = None
    """The same under remat ``dots``: results of products with weights only; None: not analysed, so not legal."""
    candidates: tuple[Candidate, ...] = ()
    """Best first; empty when no class may be sharded."""
    ulysses: Ulysses | None = None
    """Ulysses sequence parallelism; None: not legal."""
    data: tuple[Collective, ...] = ()
    """Collectives of sharding ``batch`` other than parameter gradients (for example the mean of the loss); those that
    sum over ``seq`` too (``Collective.over``) take in the ranks that shard it."""
    measured: Measured | None = None
    """Written by the profilers; takes the place of formulas on the devices that it names."""
    memory: MeasuredMemory | None = None
    """Likewise, of compiled programs."""

    @property
    def best_candidate(self) -> Candidate | None:
        """The candidate that tensor parallelism shards; None when no class may be sharded."""
        return self.candidates[0] if self.candidates else None


class LayerRun(Value, frozen=True, kw_only=True):
    """``count`` consecutive layers of one kind."""

    kind: str
    count: Count


class ModelProfile(Document, frozen=True, kw_only=True):
    """A model as the search sees it: its layers in order, and the kinds they are of."""

    DOCUMENT: ClassVar[str] = "model profile"

    name: str
    source: str
    """Where it comes from, for example ``"galvatron_jax.analysis of preset llama2-7b"``."""
    structure: str
    """Hash of the analysed program: a plan names it, and is refused for another one."""
    dtype: str
    """Compute dtype."""
    seq: Count
    layers: tuple[LayerRun, ...]
    """All layers in order, the segments before (``embed``) and after (``head``) the repeated ones included."""
    kinds: tuple[LayerKind, ...]
    causal_attention: bool = False
    """Attention was called with ``is_causal``: kernels skip the upper half."""

    def kind(self, name: str) -> LayerKind:
        """The layer kind called ``name`` (KeyError when there is none)."""
        for kind in self.kinds:
            if kind.name == name:
                return kind
        raise KeyError(name)

    @property
    def layer_count(self) -> int:
        """Number of layers, embedding and head segments included."""
        return sum(run.count for run in self.layers)

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters of the whole model."""
        return sum(
            run.count * round(sum(p.array().elements(kind.classes, {}) for p in kind.parameters if not p.tied))
            for run in self.layers
            for kind in [self.kind(run.kind)]
        )

    def at_seq(self, seq: int) -> ModelProfile:
        """The same model at another sequence length (what was measured at this one is dropped)."""
        if seq == self.seq:
            return self
        kinds = tuple(
            msgspec.structs.replace(kind, classes={**kind.classes, SEQ: seq}, measured=None, memory=None)
            if SEQ in kind.classes
            else kind
            for kind in self.kinds
        )
        return msgspec.structs.replace(self, seq=seq, kinds=kinds)

    def at_dtype(self, dtype: str) -> ModelProfile:
        """The same model computed in ``dtype`` (arrays of the present compute dtype change, float32 ones stay).

        What was measured in the present dtype is dropped.
        """
        if dtype == self.dtype:
            return self
        unmeasured = self.with_measured({}).with_memory({})
        return msgspec.convert(_replace_text(msgspec.to_builtins(unmeasured), self.dtype, dtype), ModelProfile)

    def with_measured(self, measured: Mapping[str, Measured]) -> ModelProfile:
        """The same model with what was measured of each kind, by its name; kinds not named have nothing."""
        kinds = tuple(msgspec.structs.replace(kind, measured=measured.get(kind.name)) for kind in self.kinds)
        return msgspec.structs.replace(self, kinds=kinds)

    def with_memory(self, memory: Mapping[str, MeasuredMemory]) -> ModelProfile:
        """The same model with the compiled memory of each kind, by its name; kinds not named have none."""
        kinds = tuple(msgspec.structs.replace(kind, memory=memory.get(kind.name)) for kind in self.kinds)
        return msgspec.structs.replace(self, kinds=kinds)


def _replace_text(value: object, old: str, new: str) -> object:
    """``value`` with the dtype fields that hold ``old`` changed to ``new``."""
    if isinstance(value, dict):
        return {
            key: new if key in ("dtype", "compute_dtype") and part == old else _replace_text(part, old, new)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_replace_text(part, old, new) for part in value]
    return value
