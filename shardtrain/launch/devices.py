"""The devices of a process, real or emulated, on the platform that a run asks for."""

from __future__ import annotations

import contextlib
from typing import Literal

import jax

from shardtrain.errors import UserError
from shardtrain.launch.cpu_collectives import order_collectives

Platform = Literal["auto", "cpu", "cuda"]


def check_emulate(platform: Platform, emulate: int | None) -> None:
    """Refuse emulated devices on a platform of real ones."""
    if platform == "cuda" and emulate is not None:
        rule = "emulated devices are CPU devices, and devices.platform is cuda"
        raise UserError("devices.emulate", emulate, rule, "set devices.emulate=null or devices.platform=cpu")


def select_devices(platform: Platform = "auto", emulate: int | None = None, processes: int = 1) -> list[jax.Device]:
    """Start JAX on a platform and return the devices to train on.

    If these may be several CPU devices, JAX is prepared for their collectives (`cpu_collectives.py`).

    Args:
      platform: `cpu`, `cuda`, or `auto` for whatever JAX finds first. `emulate` implies `cpu`.
      emulate: number of CPU devices to emulate in all processes together. It takes effect only before JAX's backend
        starts.
      processes: number of processes that share them.

    Raises:
      UserError: the platform is missing, or the backend already runs with other or fewer devices.
    """
    if emulate is not None:
        check_emulate(platform, emulate)
        if emulate % processes:
            raise UserError(f"devices.emulate {emulate} is not a multiple of the {processes} processes; use a multiple")
        platform = "cpu"
        with contextlib.suppress(RuntimeError):  # the backend already runs; its devices are checked below
            jax.config.update("jax_num_cpu_devices", emulate // processes)
    if platform != "auto":
        jax.config.update("jax_platforms", platform)
    if platform != "cuda":
        order_collectives()
    try:
        devices = jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an empty assertion is how JAX says that it lacks the plugin
        reason = str(error).partition("\n")[0] or "this JAX is installed without support for it"
        raise UserError(
            f"devices.platform is {platform}, but JAX finds no such device here ({reason}); "
            "install the extra shardtrain[cuda12] or shardtrain[cuda13] on a machine with a GPU, or set "
            "devices.platform=cpu"
        ) from error
    found = {"gpu": "cuda"}.get(devices[0].platform, devices[0].platform)
    if platform not in ("auto", found):
        raise UserError(
            f"devices.platform is {platform}, but JAX already runs on {found}: the platform can only be chosen before "
            "JAX is first used; start a fresh process, or select devices before any jax call"
        )
    if emulate is not None and len(devices) < emulate:
        raise UserError(
            f"devices.emulate is {emulate}, but JAX already runs with {len(devices)} CPU devices: the number can only "
            "be set before JAX is first used; start a fresh process, or select devices before any jax call"
        )
    return devices[:emulate]
