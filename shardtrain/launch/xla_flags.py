"""XLA's own flags: a preset for GPUs, the user's options, and an error for a flag that would have no effect.

Options are passed to the compiler with the train and eval steps (`jax.jit(compiler_options=...)`). Flags that XLA reads
only from the variable `XLA_FLAGS`, when JAX starts, belong in `environment`.
"""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jaxlib

from shardtrain.errors import UserError, nearest

Preset = Literal["auto", "none", "gpu-default"]
Value = bool | int | float | str


class Choice(NamedTuple):
    """One line of a preset.

    Attributes:
      why: what it is good for.
      spellings: flag and value in different releases of XLA, newest first.
    """

    why: str
    spellings: tuple[tuple[str, Value], ...]


_ON = "COLLECTIVE_PIPELINING_MODE_ON"
#: Sources: "Tips for High-Performance LLMs with JAX and XLA" (NVIDIA/JAX-Toolbox), "GPU optimization levels" (XLA) and,
#: for the newer spelling, openxla/xla pull 45836. CUDA graphs (`xla_gpu_enable_command_buffer`) are on by default.
GPU_DEFAULT: tuple[Choice, ...] = (
    Choice(
        "moves collectives and copies to where computation hides them",
        (("xla_gpu_enable_latency_hiding_scheduler", True),),
    ),
    Choice(
        "unrolls the scan over layers by two, so that one layer's collectives overlap the next one's work",
        (("xla_gpu_enable_while_loop_double_buffering", True),),
    ),
    Choice(
        "gathers the weights of a layer (fsdp) one layer ahead",
        (("xla_gpu_pipeline_all_gather", _ON), ("xla_gpu_enable_pipelined_all_gather", True)),
    ),
    Choice(
        "scatters the gradients of a layer (fsdp) while the next is computed",
        (("xla_gpu_pipeline_reduce_scatter", _ON), ("xla_gpu_enable_pipelined_reduce_scatter", True)),
    ),
    Choice(
        "the same for all-reduces (tensor)",
        (("xla_gpu_pipeline_all_reduce", _ON), ("xla_gpu_enable_pipelined_all_reduce", True)),
    ),
    Choice(
        "one gather for all the weights of a layer: large messages use the links better",
        (("xla_gpu_all_gather_combine_threshold_bytes", 2**30),),
    ),
    Choice(
        "one scatter for all the gradients of a layer",
        (("xla_gpu_reduce_scatter_combine_threshold_bytes", 2**30),),
    ),
    Choice(
        "large messages for gradients over `data`, but still several, so that the first ones leave early",
        (("xla_gpu_all_reduce_combine_threshold_bytes", 2**27),),
    ),
)

#: Accepted as an option by every XLA, but read only when JAX starts.
_START_ONLY = {"xla_force_host_platform_device_count": "use devices.emulate"}


def cuda_capability(device: jax.Device) -> float | None:
    """Return the compute capability of an NVIDIA GPU, such as 9.0; `None` for any other device.

    GPUs of AMD have names there (`gfx942`). The version of the client is no substitute: for compile-only devices
    (`jax.experimental.topologies`) it does not mention CUDA.
    """
    capability = str(getattr(device, "compute_capability", ""))
    is_gpu = device.platform in ("gpu", "cuda")
    return float(capability) if is_gpu and re.fullmatch(r"\d+\.\d+", capability) else None


def compiler_options(
    preset: Preset = "none", options: Mapping[str, Value] | None = None, device: jax.Device | None = None
) -> dict[str, Value]:
    """Return the options for compiling a step: the preset for the device, overridden by `options`.

    This XLA knows all of them. Lines of a preset that it does not know under any spelling are left out.

    Args:
      preset: `gpu-default`, `none`, or `auto`: `gpu-default` on NVIDIA GPUs and `none` elsewhere.
      options: flag, as in `XLA_FLAGS` without dashes, to value: bool, number or text.
      device: one of those that will run the program; by default JAX's first.

    Raises:
      UserError: a flag is unknown to this XLA, has a wrong value, is for another kind of device, or is read only from
        the environment; or a GPU preset is used for other devices.
    """
    device = jax.devices()[0] if device is None else device
    kind, nvidia = "gpu" if device.platform == "cuda" else device.platform, cuda_capability(device) is not None
    if not nvidia:
        check_preset(preset, device.platform)
    chosen = _known(GPU_DEFAULT, device) if nvidia and preset != "none" else {}
    for flag, value in (options or {}).items():
        _require(flag, value, kind, device)
    return {**chosen, **(options or {})}


def check_preset(preset: Preset, platform: str) -> None:
    """Refuse the preset for NVIDIA GPUs on other devices, those of `platform`."""
    if preset == "gpu-default":
        rule = f"gpu-default is for NVIDIA GPUs, and the devices are {platform}"
        raise UserError("xla.preset", preset, rule, "use xla.preset=auto, which takes it on GPUs only, or none")


def _known(choices: tuple[Choice, ...], device: jax.Device) -> dict[str, Value]:
    """Return the first spelling of each choice that this XLA accepts."""
    found = (next((s for s in choice.spellings if _refusal(*s, device) is None), None) for choice in choices)
    return dict(spelling for spelling in found if spelling is not None)


def _require(flag: str, value: Value, kind: str, device: jax.Device) -> None:
    name = f"xla.options.{flag}"
    if flag in _START_ONLY:
        raise UserError(f"{name} is read only when JAX starts and would do nothing as an option; {_START_ONLY[flag]}")
    meant = next((platform for platform in ("gpu", "cpu", "tpu") if flag.startswith(f"xla_{platform}_")), kind)
    if meant != kind:
        raise UserError(f"{name} is for {meant.upper()}s and would do nothing on {device.platform}; drop it")
    refusal = _refusal(flag, value, device)
    if refusal is None:
        return
    if "No such compile option" not in refusal:
        raise UserError(f"{name} is {value!r}, which this XLA refuses: {refusal}; give it another value")

    def known(name: str) -> bool:
        return "No such compile option" not in (_refusal(name, value, device) or "")

    if _is_environment_flag(flag, value):
        raise UserError(
            f"{name}: this XLA (jaxlib {jaxlib.__version__}) takes it only from XLA_FLAGS, when JAX starts; move it to "
            f"xla.environment, or start with XLA_FLAGS={_word(flag, value)}"
        )
    raise UserError(f"{name}: this XLA (jaxlib {jaxlib.__version__}) has no such flag; {_near(flag, known)}")


def _refusal(flag: str, value: Any, device: jax.Device) -> str | None:
    """Return XLA's objection to an option, tried on a program that does nothing; None if it has none."""
    nothing = jax.ShapeDtypeStruct((), "int32", sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x).lower(nothing).compile(compiler_options={flag: value})
    except Exception as error:  # JaxRuntimeError or, for a value of another kind, whatever the binding raises
        return str(error).removeprefix("INVALID_ARGUMENT: ").partition("\n")[0]
    return None


def set_environment(flags: Mapping[str, Value]) -> None:
    """Append flags to the variable `XLA_FLAGS`, which XLA reads once, when JAX starts a backend.

    Each is first tried in a separate process, because an unknown flag would end this one.

    Args:
      flags: name, without dashes, to value.

    Raises:
      UserError: a flag is unknown; or JAX has already started without them.
    """
    words = [_word(flag, value) for flag, value in flags.items()]
    given = os.environ.get("XLA_FLAGS", "").split()
    if set(words) <= set(given):
        return
    if has_started():
        raise UserError(
            f"xla.environment is too late: JAX has started, and reads XLA_FLAGS only then; start a fresh process, or "
            f'set XLA_FLAGS="{" ".join(words)}" in its environment'
        )
    for flag, value in flags.items():
        if not _is_environment_flag(flag, value):
            raise UserError(
                f"xla.environment.{flag} is {value!r}: this XLA (jaxlib {jaxlib.__version__}) has no such flag, or no "
                f"such value for it; {_near(flag, partial(_is_environment_flag, value=value))}"
            )
    os.environ["XLA_FLAGS"] = " ".join([*given, *words])


def has_started() -> bool:
    """Whether a backend of JAX runs already, so that it is too late for settings that are read at its start."""
    config: Any = jax.config
    count = config.jax_num_cpu_devices
    try:  # this fails once a backend has started, which is the only public sign of it
        config.update("jax_num_cpu_devices", count + 1)
    except RuntimeError:
        return True
    config.update("jax_num_cpu_devices", count)
    return False


def _is_environment_flag(flag: str, value: Value) -> bool:
    code = "import jax; jax.devices()"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _word(flag, value)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False).returncode == 0


def _word(flag: str, value: Value) -> str:
    return f"--{flag}={str(value).lower() if isinstance(value, bool) else value}"


def _near(flag: str, known: Callable[[str], bool]) -> str:
    """Suggest the most similar flag that XLA knows. The names of its options can only be found in its binary."""
    library = next(Path(jaxlib.__file__).parent.glob("libjax_common*"), None)
    names: set[str] = set()
    if library is not None:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            names = {name.decode() for name in re.findall(rb"xla_[a-z0-9_]{4,80}", content)}
    for _ in range(5):  # some of the strings are old names, or no names at all
        near = nearest(flag, names, cutoff=0.75)
        if near is None:
            break
        if known(near):
            return f"did you mean {near}?"
        names.remove(near)
    return "see the flags of its release in xla/debug_options_flags.cc"
