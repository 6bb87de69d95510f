"""The rules table: partitions, what it refuses, and how it behaves inside manual regions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.sharding import DEFAULT_RULES, Partitioner, constrain, current, make_rules, use
from shardtrain.sharding.mesh import AXES, MeshSpec


@pytest.fixture(scope="module")
def cube() -> Partitioner:
    return Partitioner(MeshSpec(data=2, fsdp=2, tensor=2).build())


def test_every_rule_names_mesh_axes():
    assert {axis for row in DEFAULT_RULES.values() for axis in row} <= set(AXES)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("batch", "seq", "embed"), None),  # batch and embed both want fsdp
        (("batch", "seq", None), P(("data", "fsdp"))),
        (("batch", "seq", "heads", "head_dim"), P(("data", "fsdp"), None, "tensor")),
        (("embed", "mlp"), P("fsdp", "tensor")),
        (("layers", "vocab", "embed"), P(None, "tensor", "fsdp")),
        ((), P()),
    ],
)
def test_spec(cube, axes, spec):
    if spec is None:
        with pytest.raises(UserError, match=r"'batch' and 'embed' on mesh axis 'fsdp'.*rules.embed or rules.batch"):
            cube.spec(*axes)
    else:
        assert cube.spec(*axes) == spec


def test_shards_counts_the_shards_of_a_dim(cube):
    assert {name: cube.shards(name) for name in ("batch", "embed", "seq", "head_dim")} == {
        "batch": 4,
        "embed": 2,
        "seq": 1,
        "head_dim": 1,
    }


def test_one_mesh_axis_twice_is_an_error_even_where_it_is_dropped(cube):
    with pytest.raises(UserError, match=r"'heads' and 'mlp' on mesh axis 'tensor'"):
        cube.spec("heads", "mlp", drop=("tensor",))


def test_an_axis_of_size_one_may_be_named_twice():
    one = Partitioner(MeshSpec(data=8).build())
    assert one.spec("heads", "mlp") == P()


def test_an_unknown_name_suggests_the_nearest(cube):
    with pytest.raises(
        UserError, match=r"'emned' has no rule; did you mean embed\? \(or add rules.emned, null to keep"
    ):
        cube.spec("emned")
    with pytest.raises(UserError, match=r"'zzz' has no rule; use one of batch, seq, embed"):
        cube.shards("zzz")


@pytest.mark.parametrize(
    ("axes", "shape", "parts"),
    [
        (
            ("embed", "mlp"),
            (6, 9),
            ["dim 1 = 9: the rules split 'mlp' over tensor 2", "8 or 10", "mesh.tensor among [1]", "rules.mlp=null"],
        ),
        (
            ("batch", "seq"),
            (6, 4),
            ["dim 0 = 6: the rules split 'batch' over data 2 x fsdp 2 = 4", "4 or 8", "rules.batch=null"],
        ),
    ],
)
def test_a_dim_that_does_not_divide_is_named_with_its_sizes_and_a_fix(cube, axes, shape, parts):
    with pytest.raises(UserError, match=r"^weight blocks.w: ") as error:
        cube.sharding(axes, shape, "weight blocks.w")
    for part in parts:
        assert part in str(error.value)


def test_one_axis_per_dim(cube):
    with pytest.raises(UserError, match=r"w has shape \(4, 4\), but 1 logical axes \('embed',\): give one per dim"):
        cube.sharding(("embed",), (4, 4), "w")


def test_rules_are_overridden_row_by_row(cube):
    rules = make_rules({"mlp": None, "embed": ["data", "fsdp"], "time": "context", "seq": "tensor"})
    other = Partitioner(cube.mesh, rules)
    assert other.spec("embed", "mlp", "seq") == P(("data", "fsdp"), None, "tensor")
    assert rules["time"] == ("context",)
    assert rules["seq_residual"] == ("tensor",)  # as seq, unless it is given itself
    assert make_rules({"seq": None, "seq_residual": "tensor"})["seq_residual"] == ("tensor",)
    assert {k: v for k, v in rules.items() if k not in ("mlp", "embed", "time", "seq", "seq_residual")} == {
        k: v for k, v in DEFAULT_RULES.items() if k not in ("mlp", "embed", "seq", "seq_residual")
    }
    with pytest.raises(TypeError):
        rules["mlp"] = ("tensor",)  # immutable: nothing can change a run's layout from outside


def test_an_override_names_an_existing_mesh_axis():
    with pytest.raises(UserError, match=r"rules.mlp = tensr: there is no such mesh axis; did you mean tensor"):
        make_rules({"mlp": "tensr"})


def test_a_row_names_a_mesh_axis_once():
    with pytest.raises(UserError, match=r"rules.mlp = .*: .* tensor is named 2 times; name tensor once"):
        make_rules({"mlp": ["tensor", "fsdp", "tensor"]})


def test_drop_leaves_mesh_axes_out(cube):
    assert cube.spec("batch", "mlp", drop=("fsdp",)) == P("data", "tensor")
    assert cube.sharding(("embed", "mlp"), (3, 4), drop=("fsdp",)).spec == P(None, "tensor")


def shards(x: jax.Array) -> set[tuple[int, ...]]:
    return {s.data.shape for s in x.addressable_shards}


def test_constrain_lays_a_value_out(cube):
    y = jax.jit(lambda x: cube.constrain(x, "batch", "mlp"))(jnp.arange(32.0).reshape(8, 4))
    assert shards(y) == {(2, 2)}
    assert np.array_equal(y, np.arange(32.0).reshape(8, 4))


def test_the_partitioner_in_use_is_an_explicit_context(cube):
    x = jnp.ones((8, 4))
    assert current() is None
    assert constrain(x, "batch", "no such name") is x  # one device: there is nothing to lay out
    with use(cube):
        assert current() is cube
        assert shards(jax.jit(lambda x: constrain(x, "batch", "mlp"))(x)) == {(2, 2)}
        with use(None):
            assert current() is None
        with pytest.raises(UserError, match=r"^scores: dim 0"):
            constrain(x[:3], "batch", None, name="scores")
    assert current() is None


@pytest.mark.parametrize("manual", [("data",), ("data", "fsdp"), ("tensor",), ("data", "fsdp", "tensor"), AXES])
def test_axes_that_are_manual_are_dropped_and_the_others_still_constrain(cube, manual):
    seen = []

    def body(x):
        seen.append((cube.spec("batch", "mlp"), cube.sharding(("batch", "mlp"), x.shape).spec))
        return cube.constrain(2 * x, "batch", "mlp")

    split = [tuple(a for a in part if a in manual) or None for part in (("data", "fsdp"), ("tensor",))]
    run = jax.shard_map(
        body, mesh=cube.mesh, in_specs=P(*split), out_specs=P(*split), axis_names=set(manual), check_vma=False
    )
    x = jnp.arange(32.0).reshape(8, 4)
    y = jax.jit(run)(x)
    assert np.array_equal(y, 2 * x)
    assert shards(y) == {(2, 2)}  # half by hand, the other half by the constraint
    (spec, checked), *_ = seen
    assert spec == checked
    assert not {a for part in spec for a in ((part,) if isinstance(part, str) else part or ())} & set(manual)


def test_a_manual_dim_is_checked_against_its_local_size(cube):
    def body(x):  # [8 / data 2, 4]: divides over fsdp 2, the axis that is left
        with pytest.raises(UserError, match=r"dim 0 = 3: the rules split 'batch' over fsdp 2, which does not"):
            cube.constrain(x[:3], "batch", "mlp")
        return x

    jax.jit(jax.shard_map(body, mesh=cube.mesh, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(
        jnp.ones((8, 4))
    )


def test_gradients_through_a_manual_region_from_outside(cube):
    def loss(x):
        def body(x):
            y = cube.constrain(jnp.sin(x), "batch", "mlp")
            return jax.lax.psum(y.sum(), "data")

        return jax.shard_map(body, mesh=cube.mesh, in_specs=P("data"), out_specs=P(), axis_names={"data"})(x)

    x = jnp.arange(32.0).reshape(8, 4)
    assert np.allclose(jax.jit(jax.grad(loss))(x), np.cos(x), atol=1e-6)


def test_what_a_partitioner_is_given(cube):
    mesh = cube.mesh
    explicit = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names))
    for given, message in (
        (({"fsdp": 2},), r"the mesh of a Partitioner is a dict, but must be a Mesh .*MeshSpec"),
        ((jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]),), "has no axis island, pipe, fsdp"),
        ((explicit,), "not all Auto; make the mesh with MeshSpec"),
        (
            (mesh, ["embed"]),
            "the rules of a Partitioner is a list of .*, but must be a Mapping; make them with",
        ),
        ((mesh, {"embed": "fsdp"}), "row 'embed' of the rules of a Partitioner is 'fsdp', but must be a tuple"),
    ):
        with pytest.raises(UserError, match=message):
            Partitioner(*given)


def test_a_mesh_axis_is_no_logical_axis(cube):
    with pytest.raises(UserError, match="weight w: 'tensor' is a mesh axis; a tensor names logical axes"):
        cube.sharding(("tensor",), (8,), "weight w")
    with pytest.raises(UserError, match="'data' is a mesh axis"):
        cube.constrain(jnp.ones(8), "data")
