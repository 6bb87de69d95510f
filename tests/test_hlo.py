"""The HLO parser on programs that XLA compiled here, and on the same texts with one thing changed."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.errors import UserError
from shardtrain.hlo import Array, UnknownHLOError, collectives, in_flight

AXES = ("data", "fsdp", "tensor")
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(AXES, n)]


@pytest.fixture(scope="module", params=["in order", "shuffled"])
def mesh(request):
    """Shuffled: a device's id is not its position in the mesh, as on real networks."""
    order = np.arange(8) if request.param == "in order" else np.random.default_rng(0).permutation(8)
    return Mesh(np.array(jax.devices())[order].reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def manual(mesh, f, in_specs, out_specs, **shapes):
    f = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return compiled(f, jax.ShapeDtypeStruct((8, 16), jnp.float32), *shapes.values())


def sharded(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def constrain(mesh, x, *spec):
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def only(found):
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("axes", SUBSETS)
def test_psum_over_any_axes(mesh, axes):
    c = only(collectives(manual(mesh, lambda x: jax.lax.psum(x, axes), P("data"), P(None)), mesh))
    assert (c.kind, c.axes, c.shapes, c.dtype, c.bytes) == ("all-reduce", {*axes}, ((4, 16),), "f32", 256)
    assert (c.loops, c.conditional, c.times) == ((), False, 1)
    assert "psum" in c.op_name
    assert {len(g) for g in c.groups} == {2 ** len(axes)}


def test_manual_collectives_state_both_sides(mesh):
    gather = manual(mesh, lambda x: jax.lax.all_gather(x, ("tensor", "data"), tiled=True), P("fsdp"), P())
    scatter = manual(mesh, lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"))
    exchange = manual(mesh, lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P("fsdp"), P(None, "fsdp"))
    gather, scatter, exchange = (only(collectives(t, mesh)) for t in (gather, scatter, exchange))
    assert (gather.kind, gather.axes) == ("all-gather", {"tensor", "data"})
    assert (gather.operands, gather.results) == ((Array("f32", (4, 16)),), (Array("f32", (16, 16)),))
    assert (scatter.kind, scatter.axes) == ("reduce-scatter", {"data"})
    assert (scatter.operands, scatter.results) == ((Array("f32", (8, 16)),), (Array("f32", (4, 16)),))
    assert gather.bytes == 16 * 16 * 4
    assert scatter.bytes == 8 * 16 * 4
    assert (exchange.kind, exchange.axes, exchange.bytes) == ("all-to-all", {"fsdp"}, 4 * 16 * 4)


@pytest.mark.parametrize("pairs", [[(0, 1), (1, 0)], [(0, 1)]])
def test_ppermute(mesh, pairs):
    c = only(collectives(manual(mesh, lambda x: jax.lax.ppermute(x, "fsdp", pairs), P("fsdp"), P("fsdp")), mesh))
    assert (c.kind, c.axes, len(c.groups)) == ("collective-permute", {"fsdp"}, 4 * len(pairs))


def test_an_axis_of_size_one_sends_nothing(mesh):
    flat = Mesh(mesh.devices.reshape(8, 1), ("a", "one"))
    assert only(collectives(manual(flat, lambda x: jax.lax.psum(x, "one"), P("a"), P("a")), flat)).axes == set()


def test_part_of_an_axis_spans_it(mesh):
    half = Mesh(mesh.devices.reshape(2, 4), ("a", "b"))
    sum_pairs = lambda x: jax.lax.psum(x, "b", axis_index_groups=[[0, 3], [1, 2]])  # noqa: E731
    c = only(collectives(manual(half, sum_pairs, P("b"), P("b")), half))
    assert c.axes == {"b"}
    assert set(c.groups) == {(0, 3), (1, 2), (4, 7), (5, 6)}


def mlp(mesh, x_BD, w_DF, v_FD):
    h_BF = constrain(mesh, x_BD @ w_DF, ("data", "fsdp"), "tensor")
    return constrain(mesh, h_BF @ v_FD, ("data", "fsdp"))


def layers(mesh, x_BD, w_LDF, v_LFD):
    x_BD, _ = jax.lax.scan(lambda x, wv: (mlp(mesh, x, *wv), None), x_BD, (w_LDF, v_LFD))
    return x_BD.sum()


def layer_args(mesh, n):
    x = sharded(mesh, (16, 32), ("data", "fsdp"))
    return (
        x,
        sharded(mesh, (n, 32, 64), None, "fsdp", "tensor"),
        sharded(mesh, (n, 64, 32), None, "tensor", "fsdp"),
    )


def test_gspmd_scan(mesh):
    found = collectives(compiled(lambda *a: layers(mesh, *a), *layer_args(mesh, 5)), mesh)
    inside = [(c.kind, *sorted(c.axes)) for c in found if c.loops]
    assert sorted(inside) == [("all-gather", "fsdp"), ("all-gather", "fsdp"), ("all-reduce", "tensor")]
    assert {c.times for c in found if c.loops} == {5}
    outside = only([c for c in found if not c.loops])
    assert (outside.kind, outside.axes, outside.shapes) == ("all-reduce", {"data", "fsdp"}, ((),))


def test_gspmd_gradient_reduces_weights_over_the_batch_axes(mesh):
    found = collectives(compiled(jax.grad(lambda *a: layers(mesh, *a), argnums=(1, 2)), *layer_args(mesh, 3)), mesh)
    over_data = [c for c in found if "data" in c.axes]
    assert sum(c.bytes for c in over_data) == 2 * 32 * 32 * 4  # both weights' shards over tensor
    assert all(c.kind in ("all-reduce", "reduce-scatter") and c.times == 3 for c in over_data)


def test_permuted_groups_of_the_partitioner(mesh):
    """JAX 0.10 prints `mesh[...], device_ids=(...)` here."""
    text = compiled(lambda x: x.sum(0), sharded(mesh, (8, 16), ("tensor", "data")))
    assert only(collectives(text, mesh)).axes == {"tensor", "data"}


def test_nested_loops_are_listed_outermost_first(mesh):
    def inner(c, _):
        return jax.lax.psum(c, "tensor") * 0.1, None

    def outer(c, _):
        return jax.lax.psum(jax.lax.scan(inner, c, None, length=3)[0], "data"), None

    text = manual(mesh, lambda x: jax.lax.scan(outer, x, None, length=4)[0], P("data"), P())
    trips = {c.axes: ([loop.trips for loop in c.loops], c.times) for c in collectives(text, mesh)}
    assert trips == {frozenset({"tensor"}): ([4, 3], 12), frozenset({"data"}): ([4], 4)}


def test_unknown_trip_count(mesh):
    def grow(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, "tensor"), x)

    c = only(collectives(manual(mesh, grow, P("data"), P("data")), mesh))
    assert [loop.trips for loop in c.loops] == [None]
    assert c.times is None


def test_branches_are_conditional(mesh):
    def choose(x, i):
        branches = [
            lambda x: jax.lax.psum(x, "tensor"),
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            lambda x: x,
        ]
        return jax.lax.pmax(jax.lax.switch(i, branches, x), "fsdp")

    text = manual(mesh, choose, (P("data"), P()), P("data"), i=jax.ShapeDtypeStruct((), jnp.int32))
    found = {(c.kind, *c.axes): c.conditional for c in collectives(text, mesh)}
    assert found == {
        ("all-reduce", "tensor"): True,
        ("collective-permute", "data"): True,
        ("all-reduce", "fsdp"): False,
    }


def test_merged_arrays_are_all_listed(mesh):
    text = manual(mesh, lambda x: jax.lax.psum((x, x * 2, x.sum().astype(jnp.int32)), "fsdp"), P("data"), P())
    arrays = sorted((a.dtype, a.shape) for c in collectives(text, mesh) for a in c.results)
    assert arrays == [("f32", (4, 16)), ("f32", (4, 16)), ("s32", ())]


# One program's text, changed in one place.


@pytest.fixture(scope="module")
def ordered():
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def loop_text(ordered):
    """One all-reduce over tensor in a loop of 4, with its groups as a list on every version of JAX."""

    def step(c, _):
        return jax.lax.psum(c, "tensor"), None

    text = manual(ordered, lambda x: jax.lax.scan(step, x, None, length=4)[0], P("data"), P("data"))
    text, n = re.subn(r"replica_groups=.*?(?=, use_global)", "replica_groups={{0,1},{2,3},{4,5},{6,7}}", text)
    assert n == 1
    return text


def iota(mesh, axes):
    """The iota syntax of groups over `axes`, built from numpy's definition of it."""
    last = [AXES.index(a) for a in axes]
    order = [d for d in range(3) if d not in last] + last
    return f"[{8 // 2 ** len(last)},{2 ** len(last)}]<=[2,2,2]T({','.join(map(str, order))})"


@pytest.mark.parametrize("axes", SUBSETS)
def test_every_syntax_of_groups_says_the_same(ordered, loop_text, axes):
    last = [AXES.index(a) for a in axes]
    rows = np.moveaxis(np.arange(8).reshape(2, 2, 2), last, range(3 - len(last), 3)).reshape(-1, 2 ** len(last))
    lists = "{" + ",".join("{" + ",".join(map(str, r)) + "}" for r in rows) + "}"
    quoted = ",".join(f"'{a}'" for a in axes)
    named = f"mesh['data'=2,'fsdp'=2,'tensor'=2] {{{quoted}}}"
    parts = ",".join(f"'all':({2**i})2" for i in last)
    sub = f"mesh['all'=8] {{{parts}}}"
    reversed_ids = f"mesh['tensor'=2,'fsdp'=2,'data'=2], device_ids=([2,2,2]T(2,1,0)) {{{quoted}}}"
    listed_ids = f"mesh['tensor'=2,'fsdp'=2,'data'=2], device_ids=(0,4,2,6,1,5,3,7) {{{quoted}}}"
    for syntax in (lists, iota(ordered, axes), named, sub, reversed_ids, listed_ids):
        text = loop_text.replace("{{0,1},{2,3},{4,5},{6,7}}", syntax)
        c = only(collectives(text, ordered))
        assert c.axes == {*axes}, syntax
        assert {frozenset(g) for g in c.groups} == {frozenset(r) for r in rows.tolist()}, syntax


def test_empty_groups_are_everybody(ordered, loop_text):
    text = loop_text.replace("{{0,1},{2,3},{4,5},{6,7}}", "{}")
    assert only(collectives(text, ordered)).axes == {*AXES}


def start(text, op, result, attributes=""):
    """`text` with its all-reduce made asynchronous: `op-start` of type `result`, then its done."""
    line = re.search(r"%(\S+) = (\S+) all-reduce\((.*?)\), (.*)", text)
    name, type_, operand, rest = line.groups()
    begin = f"%begin = {result.format(t=type_)} {op}-start({operand}), {attributes or rest}"
    return text.replace(line[0], f"{begin}\n  %{name} = {type_} {op}-done(%begin)"), rest


def test_asynchronous_collectives_count_once(ordered, loop_text):
    """The forms of the GPU backend."""
    sync = only(collectives(loop_text, ordered))
    reduced, rest = start(loop_text, "all-reduce", "{t}")
    permuted, _ = start(
        loop_text,
        "collective-permute",
        "({t}, {t}, u32[], u32[])",
        "channel_id=1, source_target_pairs={{0,1},{2,3}}",
    )
    scattered, _ = start(loop_text, "reduce-scatter", "(({t}), f32[2,16]{{1,0}})", rest + ", dimensions={0}")
    wrapped, _ = start(loop_text, "async", "(({t}), {t}, u32[])", "calls=%wrapped")
    body = f"""%wrapped (p: f32[4,16]) -> f32[4,16] {{
  %p = f32[4,16]{{1,0}} parameter(0)
  ROOT %inner = f32[4,16]{{1,0}} all-reduce(%p), {rest}
}}, execution_thread="parallel"

"""
    wrapped = wrapped.replace("ENTRY", body + "ENTRY")
    for text, kind, result in (
        (reduced, "all-reduce", (4, 16)),
        (permuted, "collective-permute", (4, 16)),
        (scattered, "reduce-scatter", (2, 16)),
        (wrapped, "all-reduce", (4, 16)),
    ):
        c = only(collectives(text, ordered))
        assert (c.kind, c.axes, c.operands, c.shapes) == (kind, {"tensor"}, sync.operands, (result,))
        assert [loop.trips for loop in c.loops] == [4]


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r" all-reduce\(", " all-reduce-v2("),
        (r" all-reduce\(", " send("),  # knows a channel
        (r" all-reduce\(", " shuffle-across("),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "flock[2]"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "{{0,1},{2,3},{4,5},{6,7}}T(1,0)"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "{{0,1},{2,3}}"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "{{0,1},{2,3},{4,5},{6,8}}"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "[4,2]<=[16]"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "mesh['a'=8] {'b'}"),
        (r"\{\{0,1\},\{2,3\},\{4,5\},\{6,7\}\}", "mesh['a'=8], device_ids=(iota) {'a'}"),
        (r"replica_groups=.*?, use_global", "use_global"),
        (r", use_global_device_ids=true", ""),
        (r", channel_id=\d+", ""),
        (r" = f32\[4,16\]\{1,0\} all-reduce", " = f32[4,<=?]{1,0} all-reduce"),
        (r" all-reduce\(%", " all-reduce(%not."),
        (r" body=%[^,]+,", ""),
        (r" body=%", " body=%not."),
        (r'"known_trip_count":\{"n":"4"\}', '"known_trip_count":{"n":{"min":"4"}}'),
        (r"num_partitions=", "replica_count=2, num_partitions="),
        (r"ENTRY ", ""),
        (r"HloModule ", "module @"),
    ],
)
def test_what_is_not_known_raises(ordered, loop_text, pattern, replacement):
    changed, n = re.subn(pattern, replacement, loop_text)
    assert n
    with pytest.raises(UnknownHLOError):
        collectives(changed, ordered)


def test_another_mesh_is_refused(ordered, loop_text):
    four = Mesh(ordered.devices[0], ("fsdp", "tensor"))
    with pytest.raises(UserError, match=r"compiled for 8 devices, but the mesh .* has 4"):
        collectives(loop_text, four)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f32", 12), ("bf16", 6), ("pred", 3), ("f8e4m3fn", 3), ("s4", 2), ("c64", 24), ("token", 0)],
)
def test_bytes(dtype, size):
    assert Array(dtype, (3,)).bytes == size


def module(*entry: str) -> str:
    """A program of these lines, in which `talks(x)` is a collective and `loop(x)` one that holds two, in order."""
    told = {
        "talks": r"f32[4] all-reduce(%\1), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%sum",
        "loop": r"f32[4] while(%\1), condition=%more, body=%twice",
        "negate": r"f32[4] negate(%\1)",
    }
    text = """HloModule m, num_partitions=2
%sum (x: f32[], y: f32[]) -> f32[] {
  %s = f32[] add(%x, %y)
}
%more (x: f32[4]) -> pred[] {
  %p = pred[] parameter(0)
}
%twice (x: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %b = talks(a)
  %c = talks(a)
}
ENTRY %main (x: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
ENTRY
}""".replace("\nENTRY\n", "".join(f"\n  %{line}" for line in entry) + "\n")
    for name, instruction in told.items():
        text = re.sub(rf"\b{name}\((\w+)\)", instruction, text)
    return text


@pytest.mark.parametrize(
    ("entry", "most"),
    [
        (["b = negate(a)"], 0),
        (["b = talks(a)", "c = talks(a)"], 1),  # in the program's order
        (["b = talks(a)", "c = loop(a)"], 1),  # the first is over when the loop starts
        (["b = loop(a)", "c = talks(a)"], 2),  # the loop is not, when the second starts
        (["b = loop(a)", "c = negate(b)", "d = talks(c)"], 1),  # which waits for the loop
        (["b = loop(a)", "c = talks(a), control-predecessors={%b}"], 1),
        (["b = loop(a)", "c = loop(a)", "d = talks(a)"], 3),
        (["b = loop(a)", "c = loop(b)", "d = talks(a)"], 2),  # of two in a chain one runs
    ],
)
def test_collectives_in_flight(entry, most):
    assert in_flight(module(*entry)) == most


def test_collectives_in_flight_within_a_loop_and_a_branch(mesh):
    """Of XLA's own making: a loop over a loop and a reduction that it does not need; the same in a branch."""

    def inner(c, _):
        return jnp.tanh(jax.lax.psum(c, "tensor")), None

    def outer(c, _):
        x, y = c
        return (jax.lax.scan(inner, x, None, length=3)[0], jax.lax.psum(y * 2, "fsdp")), None

    def nested(x):
        return jax.lax.scan(outer, (x, x), None, length=2)[0]

    def branch(x):
        return jax.lax.cond(x.sum() > 0, nested, lambda x: (x, x), x)

    for f in (nested, branch):
        assert in_flight(manual(mesh, f, P("data"), P("data"))) in (1, 2)  # whichever XLA puts first
    alone = manual(mesh, lambda x: jax.lax.scan(inner, x, None, length=3)[0], P("data"), P("data"))
    assert in_flight(alone) == 1
