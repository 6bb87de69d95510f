"""A function cut in two: what has to be done first, and what can wait.

A pipeline needs this twice. The forward pass is what can be computed before the output's gradient arrives. And of a
backward pass, the input's gradient is what the stage before waits for, while weight gradients can wait (zero bubble,
Qi et al. 2023, arXiv:2401.10241). Either way the second half starts from values that the first one keeps, and repeats
none of its work.

The function is traced, and the equations of its jaxpr are dealt to the halves. A loop is one equation: it can not be
cut, so of a loop over layers it is the body that is (see `split_backward.py`).
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
      early: for each of these, which leaf of `early` it is, if it is one.
      jaxprs: both, for those who count.
    """

    first: Callable[[Tree, Tree], tuple[Tree, list[jax.Array]]]
    second: Callable[[Tree, Tree, list[jax.Array]], Tree]
    kept: list[jax.ShapeDtypeStruct]
    early: list[int | None]
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

    place, places = _deal(jaxpr, now_out, known_in, early_in, late_in)
    second_eqns, wanted = _live(jaxpr, later_out, places, "late")
    kept = [v for v in wanted if place[v] == "early"]
    first_eqns, _ = _live(jaxpr, [*now_out, *kept], places, "early")

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

    shapes = [jax.ShapeDtypeStruct(_aval(v).shape, _aval(v).dtype) for v in kept]
    index = {v: i for i, v in enumerate(early_in)}
    return Halves(first, second, shapes, [index.get(v) for v in kept], (one, two))


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


def _deal(
    jaxpr: core.Jaxpr, now: Sequence[Any], known: Sequence[Any], early: Sequence[Any], late: Sequence[Any]
) -> tuple[dict[core.Var, str], list[str]]:
    """For each variable and for each equation, whether it is `known` (in both halves), `early` or `late`."""
    needed = {id(eqn) for eqn in _live(jaxpr, now, ["known"] * len(jaxpr.eqns), "early")[0]}
    place = dict.fromkeys((*jaxpr.constvars, *known), "known")
    place |= dict.fromkeys(early, "early") | dict.fromkeys(late, "late")
    places = []
    for eqn in jaxpr.eqns:
        fresh = [v for v in _vars(eqn.invars) if place[v] != "known"]
        if any(place[v] == "late" for v in fresh):
            assert id(eqn) not in needed, f"{eqn.primitive} is needed now, but waits for an argument that comes late"
            places.append("late")
        elif not fresh and not eqn.effects:
            places.append("known")
        elif id(eqn) in needed or eqn.effects:
            places.append("early")
        else:
            places.append("late" if _heavy(eqn) or _bytes(eqn.outvars) >= _bytes(fresh) else "early")
        place |= dict.fromkeys(eqn.outvars, places[-1])
    return place, places


def _live(
    jaxpr: core.Jaxpr, targets: Iterable[Any], places: Sequence[str], half: str
) -> tuple[list[core.JaxprEqn], dict[core.Var, None]]:
    """The equations of a half that lead to some variables or have effects; and all variables that they use."""
    wanted, live = _vars(targets), []
    for eqn, place in zip(reversed(jaxpr.eqns), reversed(places), strict=True):
        acts = place == half and bool(eqn.effects)
        if acts or (place in (half, "known") and any(v in wanted for v in eqn.outvars)):
            live.append(eqn)
            wanted |= _vars(eqn.invars)
    return live[::-1], wanted


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
