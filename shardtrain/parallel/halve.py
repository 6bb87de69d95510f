"""A function cut in two: what has to be done first, and what can wait.

A pipeline needs this twice. The forward pass is what can be computed before the output's gradient arrives. And of a
backward pass, the input's gradient is what the stage before waits for, while weight gradients can wait (zero bubble,
Qi et al. 2023, arXiv:2401.10241). Either way the second half starts from values that the first one keeps, and repeats
none of its work.

The function is traced, and the equations of its jaxpr are dealt to the halves. A loop is one equation: it can not be
cut, so a loop over layers belongs unrolled where its parts should go to different halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

Tree = Any

#: Primitives that only wrap a function: its equations are dealt one by one.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
#: Primitives worth putting off, beside those that hold a function of their own (loops, kernels).
_HEAVY = {"dot_general", "ragged_dot_general", "conv_general_dilated"}


@dataclasses.dataclass(frozen=True)
class Halves:
    """The two halves of a function.

    Attributes:
      first: `(known, early) -> (now, kept)`.
      second: `(known, late, kept) -> later`.
      kept: shapes and dtypes of what the first half keeps for the second.
      jaxprs: both, for those who count.
    """

    first: Callable[[Tree, Tree], tuple[Tree, list[jax.Array]]]
    second: Callable[[Tree, Tree, list[jax.Array]], Tree]
    kept: list[jax.ShapeDtypeStruct]
    jaxprs: tuple[core.Jaxpr, core.Jaxpr]


def halve(function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], known: Tree, early: Tree, late: Tree) -> Halves:
    """Cut `function(known, early, late) -> (now, later)`.

    The first half does what `now` needs. What `later` needs beyond that waits for the second, except where doing it at
    once leaves less to keep (a sum, a narrower dtype) and no matmul is in it. What depends on `known` alone is never
    kept, but computed again where it is used.

    Args:
      function: pure; `now` does not depend on `late`.
      known: arguments (arrays or shapes) that both halves get, such as weights.
      early: arguments of the first half.
      late: arguments of the second half.
    """
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(known, early, late)
    leaves = jax.tree.leaves((known, early, late))
    # Traced again, through all calls: a function that is called twice has the same variables in both places.
    closed = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*leaves)
    jaxpr, consts = closed.jaxpr, closed.consts
    (n_known, n_early), n_now = (len(jax.tree.leaves(t)) for t in (known, early)), len(jax.tree.leaves(outputs[0]))
    known_in, early_in, late_in = _cut(jaxpr.invars, n_known, n_known + n_early)
    now_out, later_out = _cut(jaxpr.outvars, n_now)

    given = _given(jaxpr, known_in)
    waiting = _waiting(jaxpr, now_out, set(late_in), given)
    second_eqns, open_vars = _upstream(jaxpr.eqns, later_out, lambda v: v in waiting or v in given)
    kept = [v for v in open_vars if v not in waiting and v not in given]
    first_eqns, _ = _upstream(jaxpr.eqns, [*now_out, *kept], lambda v: v not in waiting, effects=True)

    def part(invars: Sequence[core.Var], outvars: Sequence[Any], eqns: Sequence[core.JaxprEqn]) -> core.Jaxpr:
        return core.Jaxpr(jaxpr.constvars, [*invars], [*outvars], [*eqns], jaxpr.effects, jaxpr.debug_info)

    one = part([*known_in, *early_in], [*now_out, *kept], first_eqns)
    two = part([*known_in, *late_in, *kept], later_out, second_eqns)

    def first(known: Tree, early: Tree) -> tuple[Tree, list[jax.Array]]:
        out = jax.core.eval_jaxpr(one, consts, *jax.tree.leaves((known, early)))
        return jax.tree.unflatten(jax.tree.structure(outputs[0]), out[:n_now]), out[n_now:]

    def second(known: Tree, late: Tree, kept: list[jax.Array]) -> Tree:
        out = jax.core.eval_jaxpr(two, consts, *jax.tree.leaves((known, late)), *kept)
        return jax.tree.unflatten(jax.tree.structure(outputs[1]), out)

    return Halves(first, second, [jax.ShapeDtypeStruct(_aval(v).shape, _aval(v).dtype) for v in kept], (one, two))


def _inline(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr and, in place of calls, the equations of what they call."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _CALLS:
            called = next(p for p in eqn.params.values() if isinstance(p, (core.Jaxpr, core.ClosedJaxpr)))
            inner, consts = (called, ()) if isinstance(called, core.Jaxpr) else (called.jaxpr, called.consts)
            out = _inline(inner, consts, [read(v) for v in eqn.invars])
        else:
            invars = [*_vars(eqn.invars)]
            alone = core.Jaxpr([], invars, eqn.outvars, [eqn], eqn.effects, jaxpr.debug_info)
            out = jax.core.eval_jaxpr(alone, [], *(values[v] for v in invars))
        values |= zip(eqn.outvars, out, strict=True)
    return [read(v) for v in jaxpr.outvars]


def _given(jaxpr: core.Jaxpr, known: Iterable[core.Var]) -> set[core.Var]:
    """What follows from known arguments and constants alone."""
    given = {*jaxpr.constvars, *known}
    for eqn in jaxpr.eqns:
        if given.issuperset(_vars(eqn.invars)) and not eqn.effects:
            given.update(eqn.outvars)
    return given


def _waiting(jaxpr: core.Jaxpr, now: Sequence[Any], late: set[core.Var], given: set[core.Var]) -> set[core.Var]:
    """Late arguments, and all that the second half computes."""
    needed = {id(eqn) for eqn in _upstream(jaxpr.eqns, now, lambda v: True, effects=True)[0]}
    waiting = set(late)
    for eqn in jaxpr.eqns:
        fresh = [v for v in _vars(eqn.invars) if v not in given]
        if id(eqn) in needed:
            assert late.isdisjoint(fresh), f"{eqn.primitive} is needed now, but waits for an argument that comes late"
        elif not waiting.isdisjoint(fresh) or (fresh and (_heavy(eqn) or _bytes(eqn.outvars) >= _bytes(fresh))):
            waiting.update(eqn.outvars)
    return waiting


def _upstream(
    eqns: Sequence[core.JaxprEqn], targets: Iterable[Any], within: Callable[[core.Var], bool], *, effects: bool = False
) -> tuple[list[core.JaxprEqn], dict[core.Var, None]]:
    """The equations behind some variables, as far as these are `within`; and all variables that occur.

    With `effects`, equations that have some (`jax.debug.print`) count as wanted.
    """
    wanted, chosen = _vars(targets), []
    for eqn in reversed(eqns):
        if any(v in wanted and within(v) for v in eqn.outvars) or (effects and eqn.effects):
            chosen.append(eqn)
            wanted |= _vars(eqn.invars)
    return chosen[::-1], wanted


def _heavy(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in _HEAVY or any(True for _ in core.jaxprs_in_params(eqn.params))


def _bytes(variables: Iterable[core.Var]) -> int:
    return sum(_aval(v).size * _aval(v).dtype.itemsize for v in variables)


def _aval(variable: core.Var) -> Any:
    """Its shape and dtype; typed loosely because JAX's abstract values need not have any."""
    return variable.aval


def _vars(atoms: Iterable[Any]) -> dict[core.Var, None]:
    """The variables among atoms, each once, in order."""
    return {atom: None for atom in atoms if not isinstance(atom, core.Literal)}


def _cut(items: Sequence[Any], *at: int) -> list[Sequence[Any]]:
    return [items[a:b] for a, b in zip((0, *at), (*at, len(items)), strict=True)]
