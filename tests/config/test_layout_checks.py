"""Sizes against the mesh."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtrain.config import ConfigError, check_devices, load_config
from shardtrain.config.layout_checks import check_mesh
from shardtrain.config.schema import Devices, MeshSizes
from shardtrain.sharding.mesh import AXES


def test_mesh_of_6_on_8_devices(problems):
    problem = problems("mesh={fsdp: 3, tensor: 2}", "rules={embed: null, batch: null}")["mesh"]
    assert problem.value == {"fsdp": 3, "tensor": 2}
    assert "fsdp 3 x tensor 2 = 6" in problem.rule
    assert "8" in problem.rule
    assert "{fsdp: 4, tensor: 2}" in problem.fix
    assert "devices.emulate=6" in problem.fix


@given(st.dictionaries(st.sampled_from(AXES), st.integers(1, 12)), st.integers(1, 64))
def test_the_nearest_mesh_fits(sizes, devices):
    found = list(check_mesh(MeshSizes(**sizes), Devices(emulate=devices)))
    assert bool(found) == (math.prod(sizes.values()) != devices)
    for problem in found:
        nearest = re.findall(r"\w+: (\d+)", problem.fix)
        assert math.prod(map(int, nearest)) == devices


def test_two_axes_of_minus_1(problems):
    problem = problems("mesh={data: -1, fsdp: -1}")["mesh"]
    assert problem.value == {"data": -1, "fsdp": -1}
    assert "mesh.data and mesh.fsdp" in problem.rule
    assert "at most one" in problem.rule


def test_minus_1_takes_what_is_left_and_is_checked_with_that_size(base, problems):
    assert load_config(base, ["mesh={fsdp: -1, tensor: 2}"]).mesh.fsdp == -1
    found = problems("mesh={fsdp: -1, tensor: 1}", "data.global_batch=12")
    assert set(found) == {"data.global_batch"}
    assert "fsdp 8" in found["data.global_batch"].rule
    problem = problems("mesh={fsdp: -1, tensor: 3}", "rules={mlp: null, heads: null, kv_heads: null, vocab: null}")[
        "mesh"
    ]
    assert "tensor 3 = 3 must divide the devices, 8" in problem.rule
    assert "nearest mesh that fits" in problem.fix


@pytest.mark.parametrize("sizes", ["{fsdp: 0}", "{fsdp: -2}"])
def test_sizes_that_no_axis_has(problems, sizes):
    assert "mesh.fsdp" in problems(f"mesh={sizes}")


def test_every_wrong_size_is_reported(problems):
    assert set(problems("mesh={fsdp: 0, data: -2}")) == {"mesh.fsdp", "mesh.data"}


def test_slow_networks(base, problems):
    assert load_config(base, ["mesh.slow.fsdp=2"]).mesh.slow == {"fsdp": 2}
    found = problems("mesh.slow={fsdp: 3, tensr: 2}")
    assert "mesh.fsdp is 4" in found["mesh.slow.fsdp"].rule
    assert "[1, 2, 4]" in found["mesh.slow.fsdp"].fix
    assert "did you mean tensor?" in found["mesh.slow.tensr"].fix


@pytest.mark.parametrize(
    ("overrides", "path", "value", "rule", "fix"),
    [
        (["mesh={fsdp: 2, tensor: 4}", "model.n_heads=6", "model.head_dim=16", "model.n_kv_heads=null"],
         "model.n_heads", 6, "'heads' over tensor 4", "model.n_heads=4 or 8, a mesh.tensor among [1, 2, 3]"),
        (["mesh={fsdp: 2, tensor: 4}"], "model.n_kv_heads", 2, "'kv_heads' over tensor 4", "rules.kv_heads=null"),
        (["model.d_ff=511"], "model.d_ff", 511, "'mlp' over tensor 2", "model.d_ff=510 or 512"),
        (["model.vocab_size=2047"], "model.vocab_size", 2047, "'vocab' over tensor 2", "2046 or 2048"),
        (["model.d_model=126", "model.head_dim=32"], "model.d_model", 126, "'embed' over fsdp 4", "rules.embed=null"),
        (["data.global_batch=10"], "data.global_batch", 10, "'batch' over fsdp 4", "data.global_batch=8 or 12"),
        (["mesh={data: 2, fsdp: 2, tensor: 2}", "data.global_batch=2"],
         "data.global_batch", 2, "data 2 x fsdp 2 = 4", "data.global_batch=4"),
        (["optimizer.accumulate=3"], "optimizer.accumulate", 3, "16 / 4 (fsdp 4) = 4 rows", "[1, 2, 4]"),
        (["mesh={context: 8}", "data.seq_len=100"], "data.seq_len", 100, "'seq' over context 8", "96 or 104"),
        (["data.seq_len=101", "rules.seq_residual=[context, tensor]"],
         "data.seq_len", 101, "'seq_residual' over tensor 2", "100 or 102"),
        (["mesh={fsdp: 2, tensor: 4}", "rules={heads: fsdp, kv_heads: [fsdp, tensor]}"],
         "model.n_kv_heads", 2, "fsdp 2 x tensor 4 = 8", "model.n_kv_heads=8"),
    ],
)  # fmt: skip
def test_what_is_split_must_divide(problems, overrides, path, value, rule, fix):
    found = problems(*overrides)
    assert set(found) == {path}
    assert found[path].value == value
    assert rule in found[path].rule
    assert fix in found[path].fix


def test_a_rule_of_null_lifts_the_check(base):
    load_config(base, ["mesh={fsdp: 2, tensor: 4}", "rules.kv_heads=null"])


def test_a_pipeline_that_does_not_fit(problems):
    found = problems("mesh={pipe: 8}", "pipeline.chunks=2", "pipeline.microbatches=3", "optimizer.accumulate=2")
    assert set(found) == {"model.n_layers", "optimizer.accumulate", "pipeline.microbatches"}
    assert "16 pipeline stages (mesh.pipe x pipeline.chunks) need a layer each" in found["model.n_layers"].rule
    assert found["pipeline.microbatches"].rule == "16 rows per device must be divisible by the number of microbatches"


def test_a_pipeline_schedule_that_does_not_exist(problems):
    found = problems("mesh={pipe: 2, data: 4}", "pipeline.schedule=1f2b", "pipeline.microbatches=2")
    assert "did you mean 1f1b?" in found["pipeline.schedule"].fix
    found = problems("mesh={pipe: 2, data: 4}", "pipeline.schedule=zb_v", "pipeline.microbatches=2")
    assert "needs 2" in found["pipeline.schedule"].rule


def test_weights_gathered_once_per_step_are_split_over_fsdp(base, problems):
    stages = "pipeline={microbatches: 2, gather: step}"
    assert "mesh.fsdp is 1" in problems("mesh={pipe: 2, data: 4}", stages)["pipeline.gather"].rule
    assert load_config(base, ["mesh={pipe: 2, fsdp: 4}", stages]).pipeline.gather == "step"


def test_typos_in_rules(problems):
    found = problems("rules={head: tensor, mlp: tensr, vocab: [fsdp, tensr]}")
    assert "no such logical axis" in found["rules.head"].rule
    assert "did you mean heads?" in found["rules.head"].fix
    assert found["rules.mlp"].value == "tensr"
    assert "did you mean tensor?" in found["rules.mlp"].fix
    assert "rules.vocab" in found


def test_a_model_of_ones_own_may_bring_logical_axes(base, problems, own_model):
    name = own_model("class Own:\n    def __init__(self, *, vocab_size: int, rngs): ...\n")
    model = f"model={{type: '{name}:Own', vocab_size: 512}}"
    assert load_config(base, [model, "rules.channels=tensor"]).rules == {"channels": ("tensor",)}
    assert "did you mean heads?" in problems(model, "rules.head=tensor")["rules.head"].fix


OWN_SIZES = """
class Own:
    size_options = {"embed": "hidden_size", "layers": "depth", "vocab": "ids", "state": "d_state"}

    def __init__(self, *, hidden_size: int, depth: int = 4, ids: int = 512, d_state: int = 8, rngs): ...
"""


@pytest.mark.parametrize(
    ("options", "path", "rule"),
    [
        ("hidden_size: 30", "model.hidden_size", "'embed' over fsdp 4"),
        ("hidden_size: 32, d_state: 7", "model.d_state", "'state' over tensor 2"),
        ("hidden_size: 32, ids: 256", "model.ids", "at least 257 ids"),
        ("hidden_size: 0", "model.hidden_size", "greater than 0"),
    ],
)
def test_a_model_that_states_its_sizes_is_checked_by_its_own_names(base, problems, own_model, options, path, rule):
    model = "model={{type: '{}:Own', {}}}"
    name = own_model(OWN_SIZES)
    assert load_config(base, [model.format(name, "hidden_size: 32"), "rules.state=tensor"]).data.vocab_size == 512
    assert rule in problems(model.format(name, options), "rules.state=tensor")[path].rule


def test_layers_are_checked_by_the_name_that_the_model_states(problems, own_model):
    model = f"model={{type: '{own_model(OWN_SIZES)}:Own', hidden_size: 32, depth: 1}}"
    assert "need a layer each" in problems(model, "mesh={pipe: 2, fsdp: 4, tensor: 1}")["model.depth"].rule


def test_what_only_the_number_of_devices_can_tell(base):
    config = load_config(base, ["devices.emulate=null", "mesh={fsdp: -1, tensor: 2}"])
    check_devices(config, 8)
    with pytest.raises(ConfigError) as caught:
        check_devices(config, 64)
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == ("data.global_batch", 16)
    assert "fsdp 32" in problem.rule
    with pytest.raises(ConfigError, match=r"tensor 2 = 2 must divide the devices, 7 \(found\)"):
        check_devices(config, 7)
    fixed = load_config(base, ["devices.emulate=null"])
    with pytest.raises(ConfigError, match=r"fsdp 4 x tensor 2 = 8, must be the number of devices, 4"):
        check_devices(fixed, 4)


def test_a_split_backward_keeps_what_it_needs_by_itself(problems):
    overrides = ["mesh={pipe: 2, data: 4}", "pipeline={schedule: zb_h1, microbatches: 2, backward: save}"]
    assert "splits the backward pass" in problems(*overrides)["pipeline.backward"].rule
