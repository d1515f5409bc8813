"""Which parameters ranks can make gradients of apart, and which sums over the batch belong to them."""

from __future__ import annotations

from galvatron_jax.analysis import analyse_model
from galvatron_jax.profile import LayerKind
from tests.zoo import ZOO


def embedding_of(name: str) -> LayerKind:
    case = ZOO[name]()
    return analyse_model(case.build, case.loss, case.spec).profile.kind("embed")


def test_a_convolution_and_a_broadcast_to_the_batch_mix_samples() -> None:
    mixed = {p.path for p in embedding_of("vit").parameters if not p.per_sample}
    assert mixed == {"stem.kernel", "cls"}


def test_sums_over_the_batch_on_the_way_to_a_table_of_positions_are_part_of_its_reduction() -> None:
    kind = embedding_of("bert")
    assert all(p.per_sample for p in kind.parameters)
    (positions,) = (p for p in kind.parameters if p.path.startswith("position_embeddings"))
    (before,) = (c for c in kind.data if c.gradient)
    assert positions.sums == 0
    assert before.array.elements(kind.classes, {}) == positions.array().elements(kind.classes, {})


def test_sums_whose_gradients_another_layer_takes_on_are_not() -> None:
    """The bias that T5's layers add is made elsewhere: what a layer sums up is a cotangent, not a gradient."""
    case = ZOO["t5"]()
    kind = analyse_model(case.build, case.loss, case.spec).profile.kind("encoder.*")
    assert kind.data
    assert not any(c.gradient for c in kind.data)
