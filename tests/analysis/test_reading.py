"""NNX, Linen and plain trees become one value: what is trained, what is state, fresh values, the user's own object."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from galvatron_jax.analysis import abstract_batch, analyse_model, disagreeing_samples, sample_count
from galvatron_jax.analysis._batch import which_have_samples
from galvatron_jax.analysis._read import read_model

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def square(model: Any, x: jax.Array) -> jax.Array:
    value: jax.Array = jnp.mean(jnp.square(model(x)))
    return value


class Net(nn.Module):
    """Dropout, statistics, and a loss of its own that it sows."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        self.sow("losses", "norm", jnp.sum(x))
        dropped: jax.Array = nn.Dropout(0.5, deterministic=False)(x)
        return dropped


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree)


# --------------------------------------------------------------------------------------------------------------- Linen
def test_linen_module_is_initialised_by_its_loss() -> None:
    model = read_model(Net(), square, X)
    parameters, state = model.build()
    assert model.name == "Net"
    assert "Dense_1.kernel" in model.paths
    assert set(state) == {"batch_stats", "rngs"}, "sown values start empty in every step"
    assert not model.is_built
    assert _structure((parameters, state)) == _structure((model.parameters, model.state))


def test_linen_step_changes_statistics_and_draws_other_numbers_next_time() -> None:
    model = read_model(Net(), square, X)
    parameters, state = model.build()
    first, after = model.run(parameters, state, X)
    again, _ = model.run(parameters, state, X)
    second, _ = model.run(parameters, after, X)
    assert first == again != second
    assert int(after["rngs"]["dropout"]["count"]) == 1
    assert np.any(after["batch_stats"]["BatchNorm_0"]["mean"] != state["batch_stats"]["BatchNorm_0"]["mean"])


def test_linen_module_without_randomness_has_no_streams() -> None:
    assert read_model(nn.Dense(3), square, X).state == {}


def test_bound_linen_module_brings_its_values_and_is_untouched() -> None:
    module = nn.Dense(3)
    variables = module.init(jax.random.key(7), X)
    before = copy.deepcopy(jax.tree.map(np.asarray, variables))
    model = read_model(module.bind(variables), square, X)
    assert model.is_built
    parameters, _ = model.build()
    assert parameters["kernel"] is variables["params"]["kernel"]
    restored = model.restore(*model.build())
    assert _structure(restored) == _structure(variables)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_bound_seeds_are_the_seeds_of_the_initialisation() -> None:
    bound = nn.Dense(3).bind({}, rngs={"params": jax.random.key(3)})
    expected = nn.Dense(3).init(jax.random.key(3), X)["params"]
    jax.tree.map(np.testing.assert_array_equal, read_model(bound, square, X).build()[0], expected)


def test_function_that_binds_a_linen_module_is_only_traced() -> None:
    def build() -> nn.Module:
        module = nn.Dense(3)
        return module.bind(module.init(jax.random.key(1), jnp.zeros((1, 8))))

    model = read_model(build, square, X)
    assert not model.is_built
    expected = build().variables["params"]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(model.build)()[0], expected)


# ---------------------------------------------------------------------------------------------------------------- tree
def test_tree_trains_its_floats_and_keeps_the_rest() -> None:
    tree = {"w": jnp.ones((8, 8)), "ids": jnp.arange(3), "activation": jnp.tanh, "scale": 2.0}
    model = read_model(tree, lambda w, x: jnp.mean(w["activation"](x @ w["w"]) * w["scale"]), X)
    assert model.paths == ("w",)
    assert [leaf.dtype for leaf in jax.tree.leaves(model.state)] == [jnp.int32]
    restored = model.restore(*model.build())
    assert restored["activation"] is jnp.tanh
    assert restored["w"] is tree["w"]
    assert model.run(*model.build(), X)[0].shape == ()


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass
class Affine:
    """A module as Equinox has it: a pytree that can be called."""

    weight: Any
    bias: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        y: jax.Array = x @ self.weight + self.bias
        return y

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self.weight, self.bias), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: tuple[Any, Any]) -> Affine:
        return cls(*leaves)


@pytest.mark.parametrize("recipe", [True, False])
def test_pytree_that_can_be_called_is_a_tree(recipe: bool) -> None:
    made = Affine(jnp.ones((8, 8)), jnp.zeros(8))
    model = read_model((lambda: Affine(jnp.ones((8, 8)), jnp.zeros(8))) if recipe else made, square, X)
    assert (model.name, model.is_built) == ("Affine", not recipe)
    assert isinstance(model.restore(*model.build()), Affine)


# ----------------------------------------------------------------------------------------------------------------- NNX
def test_nnx_module_comes_back_as_itself() -> None:
    module = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    model = read_model(module, square, X)
    assert model.roles == ("count", "key")
    restored = model.restore(*model.build())
    assert isinstance(restored, nnx.Sequential)
    assert restored is not module
    jax.tree.map(np.testing.assert_array_equal, nnx.state(restored, nnx.Param), nnx.state(module, nnx.Param))


@pytest.mark.filterwarnings("ignore:Using .Module.sow:DeprecationWarning")
def test_nnx_values_that_the_loss_sows_are_no_state() -> None:
    class Sows(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(8, 8, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            y = self.linear(x)
            self.sow(nnx.Intermediate, "norm", jnp.sum(y))
            return y

    model = read_model(Sows, square, X)
    assert jax.tree.leaves(model.state) == []
    parameters, state = model.build()
    assert _structure(model.run(parameters, state, X)[1]) == _structure(state)


# --------------------------------------------------------------------------------------------------------------- batch
@pytest.mark.parametrize(
    ("batch", "samples", "which"),
    [
        ({"a": np.zeros((8, 3)), "b": np.zeros(8), "c": np.zeros(5)}, 8, (True, True, False)),
        ({"ids": np.zeros((8, 16)), "prior": np.zeros(64)}, 8, (True, False)),
        ({"ids": np.zeros((8, 16)), "key": jax.random.split(jax.random.key(0), 8)}, 8, (True, False)),
        ({"scale": np.float32(1)}, None, (False,)),
    ],
)
def test_leaves_with_samples_are_told_from_those_that_all_samples_share(
    batch: Any, samples: int | None, which: tuple[bool, ...]
) -> None:
    assert sample_count(batch) == samples
    assert which_have_samples(batch) == which


def test_batch_is_resized_where_it_has_samples() -> None:
    batch = abstract_batch({"ids": np.zeros((8, 16), np.int64), "prior": np.zeros(64), "t": 0.5}, 2)
    assert {name: leaf.shape for name, leaf in batch.items()} == {"ids": (2, 16), "prior": (64,), "t": ()}
    assert batch["ids"].dtype == jnp.int32


def test_leaves_that_differ_in_their_samples_alone_are_a_mistake() -> None:
    assert disagreeing_samples({"x": np.zeros((16, 4)), "y": np.zeros((8, 4)), "w": np.zeros(5)}) == [8, 16]
    assert disagreeing_samples({"x": np.zeros((16, 4)), "y": np.zeros((16, 4))}) == []


# --------------------------------------------------------------------------------------------------------------- speed
def calls_of_analysis(layers: int) -> tuple[int, int]:
    """(Python calls, layers analysed) of the analysis of a model of ``layers`` blocks."""
    import cProfile
    import pstats

    class Deep(nnx.Module):
        def __init__(self) -> None:
            self.blocks = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(layers)])

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = x + jnp.tanh(block(x))
            return x

    profile, module = cProfile.Profile(), Deep()
    profile.runcall(analyse_model, module, square, X)
    stats: Any = pstats.Stats(profile)
    analysed = sum(row[0] for (_, _, name), row in stats.stats.items() if name == "analyse_layer")
    return stats.total_calls, analysed


def test_work_grows_linearly_with_depth_and_alike_layers_are_analysed_once() -> None:
    """Of a built module: while one is built under a trace, each draw of ``nnx.Rngs`` walks all equations so far."""
    calls_of_analysis(4)  # fills JAX's caches
    counts: dict[int, tuple[int, int]] = {layers: calls_of_analysis(layers) for layers in (16, 32, 64)}
    assert {analysed for _, analysed in counts.values()} == {counts[16][1]}
    slope: Callable[[int, int], float] = lambda a, b: (counts[b][0] - counts[a][0]) / (b - a)  # noqa: E731
    assert slope(32, 64) < 1.15 * slope(16, 32)
