"""Steps whose idle ranks skip their work: when that is right, and how a step that is not is kept from running.

Ranks of a pipeline that skip take other branches than the rest. A collective waits for all members of its group, and a
permute for everybody who is in it, so one inside of such a branch may only join devices of the same rank; and no
permute, which on some backends waits for all devices, whoever sends. Otherwise the program hangs, or takes what another
branch has sent for its own. Stages hold no such collective in themselves, but the partitioner may add one: to move a
tensor to another layout, or for a sequence that is split over `context`. So the compiled program is what is asked.

Branches that all ranks take alike are made in the scope `AGREED`, and may hold any collective.
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
#: The `jax.named_scope` of a branch on what all devices know, such as whether the loss is finite.
AGREED = "agreed"


def check_branches(text: str, mesh: Mesh) -> None:
    """Refuse a compiled program (its `as_text()`) in which ranks of `pipe` that take different branches could meet.

    Raises:
      UserError: there is a collective-permute, or a collective whose groups join ranks of `pipe`, inside a conditional
        that is not `AGREED`; names one. Or the program holds what our parser does not know, so nothing can be said.
    """
    fix = "set pipeline.idle to compute (ModelDef(idle='compute')), or take the mesh axis that needs it out of the mesh"
    try:
        inside = [c for c in collectives(text, mesh) if c.conditional and f"/{AGREED}/cond/" not in c.op_name]
    except UnknownHLOError as error:
        raise UserError(f"pipeline.idle skip cannot be shown to be safe in this program ({error}); {fix}") from error
    wrong = [c for c in inside if c.kind == "collective-permute" or "pipe" in c.axes]
    if wrong:
        c = wrong[0]
        what = " and ".join(f"{a.dtype}[{','.join(map(str, a.shape))}]" for a in c.results[:2])
        raise UserError(
            f"pipeline.idle skip: {len(wrong)} collectives lie in branches that only some ranks of pipe take, but "
            f"wait for others; one is a {c.kind} of {what} over {', '.join(sorted(c.axes)) or 'no axis'} "
            f"({c.name}, {c.op_name or 'of the partitioner'}); {fix}"
        )


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered step with its own idea of what compiling makes; it has all that the step within has.

    Attributes:
      lowered: the step within.
      finish: what `compile` makes of the compiled step.
    """

    lowered: Any
    finish: Callable[[Any], Any]

    def compile(self, *args: Any, **options: Any) -> Any:
        """The compiled step, finished."""
        return self.finish(self.lowered.compile(*args, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lowered, name)


class CheckedStep:
    """A jitted function that is checked by `check_branches` before it runs, and compiled once for each kind of input.

    Args:
      jitted: from `jax.jit`.
      mesh: that it is for.
    """

    def __init__(self, jitted: Any, mesh: Mesh):
        self._jitted, self._mesh = jitted, mesh
        self._compiled: dict[Any, jax.stages.Compiled] = {}

    def lower(self, *args: Any) -> Lowered:
        """As `jax.jit` has it; what it lowers raises as `check_branches` does when it is compiled."""

        def checked(compiled: jax.stages.Compiled) -> jax.stages.Compiled:
            check_branches(compiled.as_text() or "", self._mesh)
            return compiled

        return Lowered(self._jitted.lower(*args), checked)

    def __call__(self, *args: Any) -> Any:
        """Run it.

        Raises:
          UserError: on the first call, as `check_branches`.
        """
        leaves, tree = jax.tree.flatten(args)
        kind = tree, *((jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves)
        if kind not in self._compiled:
            self._compiled[kind] = self.lower(*args).compile()
        return self._compiled[kind](*args)
