"""Steps whose idle ranks skip their work: when this is safe, and the check that refuses an unsafe step.

Pipeline ranks that skip take other branches than the rest. A collective waits for all members of its group, so inside
such a branch it may only join devices of the same rank. A permute is never safe there, because on some backends it
waits for all devices. Otherwise the program hangs, or mistakes a message of another branch for its own. Stages have no
such collective of their own, but the compiler may insert one: to reshard a tensor, or for a sequence that is split over
`context`. So the check reads the compiled program.

Branches that all ranks take together are made in the scope `UNIFORM`, and may hold any collective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from shardtrain.errors import UserError
from shardtrain.hlo import UnknownHLOError, collectives

#: What ranks without work in a tick do.
Idle = Literal["compute", "skip"]
#: The `jax.named_scope` of a branch that all devices take together, such as on whether the loss is finite.
UNIFORM = "uniform"


def check_branches(text: str, mesh: Mesh) -> None:
    """Refuse a compiled program in which ranks of `pipe` that take different branches could wait for each other.

    Args:
      text: the compiled program's `as_text()`.
      mesh: the mesh that it was compiled for.

    Raises:
      UserError: there is a collective-permute, or a collective whose groups join ranks of `pipe`, inside a conditional
        that is not `UNIFORM`; names one. Or the parser does not know some syntax, so the program cannot be checked.
    """
    fix = "set pipeline.idle to compute (ModelDef(idle='compute')), or drop the mesh axis that needs it"
    try:
        inside = [c for c in collectives(text, mesh) if c.conditional and f"/{UNIFORM}/cond/" not in c.op_name]
    except UnknownHLOError as error:
        rule = f"it cannot be shown to be safe for this program ({error})"
        raise UserError("pipeline.idle", "skip", rule, fix) from error
    wrong = [c for c in inside if c.kind == "collective-permute" or "pipe" in c.axes]
    if wrong:
        c = wrong[0]
        what = " and ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in c.results[:2])
        rule = (
            f"collectives in branches that only some ranks of pipe take wait for other ranks ({len(wrong)} found); one "
            f"is a {c.kind} of {what} over {', '.join(sorted(c.axes)) or 'no axis'} "
            f"({c.name}, {c.op_name or 'inserted by the partitioner'})"
        )
        raise UserError("pipeline.idle", "skip", rule, fix)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered step whose `compile` does more; all other attributes are those of the wrapped step.

    Attributes:
      lowered: the wrapped step, from `jax.jit(...).lower(...)`.
      finish: applied to the compiled step before it is returned.
    """

    lowered: Any
    finish: Callable[[Any], Any]

    def compile(self, *args: Any, **options: Any) -> Any:
        """Compile the step; `args` and `options` are passed on."""
        return self.finish(self.lowered.compile(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lowered, name)


class CheckedStep:
    """A jitted function that is checked by `check_branches` before it runs, and compiled once for each kind of input.

    Args:
      jitted: from `jax.jit`.
      mesh: the mesh that it runs on.
    """

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted, self._mesh = jitted, mesh
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def lower(self, *args: Any) -> Lowered:
        """Lower it for `args`, as `jax.jit` does; compiling the result raises the errors of `check_branches`."""

        def checked(compiled: jax.stages.Compiled) -> jax.stages.Compiled:
            check_branches(compiled.as_text() or "", self._mesh)
            return compiled

        return Lowered(self._jitted.lower(*args), checked)

    def __call__(self, *args: Any) -> Any:
        """Run it.

        Raises:
          UserError: as `check_branches`, on the first call.
        """
        leaves, tree = jax.tree.flatten(args)
        kind = tree, *((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
        if kind not in self._compiled:
            self._compiled[kind] = self.lower(*args).compile()
        return self._compiled[kind](*args)
