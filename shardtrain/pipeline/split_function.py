"""A function split in two: a part that runs first, and a part that can wait.

A pipeline needs this twice. The forward pass is the part that can run before the output's gradient arrives. And of a
backward pass, the previous stage waits for the input's gradient only, while weight gradients can wait (zero bubble,
Qi et al. 2023, arXiv:2401.10241). Either way the second part starts from residuals of the first one, and repeats none
of its work.

The function is traced, and each equation of its jaxpr is assigned to a part. A loop is one equation and cannot be
split, so for a loop over layers its body is split (see `split_backward.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend import core

Tree = Any

#: Primitives that only wrap a function: its equations are assigned one by one.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
#: Primitives worth deferring, in addition to those that hold a function of their own (loops, kernels).
_HEAVY = {"dot_general", "ragged_dot_general", "conv_general_dilated"}


@dataclasses.dataclass(frozen=True)
class SplitFunction:
    """The two parts of a function.

    Attributes:
      first: `(known, early) -> (now, residuals)`.
      second: `(known, late, residuals) -> later`.
      residuals: shapes and dtypes of the values that the first part stores for the second.
      arguments: for each residual, the index of the leaf of `early` that it is; `None` for a computed value.
      jaxprs: those of both parts, for tests that count operations.
    """

    first: Callable[[Tree, Tree], tuple[Tree, list[jax.Array]]]
    second: Callable[[Tree, Tree, list[jax.Array]], Tree]
    residuals: list[jax.ShapeDtypeStruct]
    arguments: list[int | None]
    jaxprs: tuple[core.Jaxpr, core.Jaxpr]


def split_function(
    function: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]], known: Tree, early: Tree, late: Tree
) -> SplitFunction:
    """Split `function(known, early, late) -> (now, later)`.

    The first part computes whatever `now` needs. All other work waits for the second part, unless doing it at once
    leaves fewer bytes to store (a sum, a narrower dtype) and it holds no matmul. Values that depend on `known` alone
    are never stored, but computed again where they are used.

    Args:
      function: pure; `now` does not depend on `late`.
      known: arguments (arrays or shapes) that both parts receive, such as weights.
      early: arguments of the first part.
      late: arguments of the second part.
    """
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(known, early, late)
    leaves = jax.tree.leaves((known, early, late))
    # Traced again, through all calls: a function that is called twice has the same variables in both places.
    closed = jax.make_jaxpr(lambda *args: _inline(closed.jaxpr, closed.consts, args))(*leaves)
    jaxpr, consts = closed.jaxpr, closed.consts
    (n_known, n_early), n_now = (len(jax.tree.leaves(t)) for t in (known, early)), len(jax.tree.leaves(outputs[0]))
    known_in, early_in, late_in = _partition(jaxpr.invars, n_known, n_known + n_early)
    now_out, later_out = _partition(jaxpr.outvars, n_now)

    place, places = _assign(jaxpr, now_out, known_in, early_in, late_in)
    second_eqns, wanted = _live(jaxpr, later_out, places, "late")
    residuals = [v for v in wanted if place[v] == "early"]
    first_eqns, _ = _live(jaxpr, [*now_out, *residuals], places, "early")

    def part(invars: Sequence[core.Var], outvars: Sequence[Any], eqns: Sequence[core.JaxprEqn]) -> core.Jaxpr:
        return core.Jaxpr(jaxpr.constvars, [*invars], [*outvars], [*eqns], jaxpr.effects, jaxpr.debug_info)

    one = part([*known_in, *early_in], [*now_out, *residuals], first_eqns)
    two = part([*known_in, *late_in, *residuals], later_out, second_eqns)

    def first(known: Tree, early: Tree) -> tuple[Tree, list[jax.Array]]:
        out = jax.core.eval_jaxpr(one, consts, *jax.tree.leaves((known, early)))
        return jax.tree.unflatten(jax.tree.structure(outputs[0]), out[:n_now]), out[n_now:]

    def second(known: Tree, late: Tree, residuals: list[jax.Array]) -> Tree:
        out = jax.core.eval_jaxpr(two, consts, *jax.tree.leaves((known, late)), *residuals)
        return jax.tree.unflatten(jax.tree.structure(outputs[1]), out)

    shapes = [jax.ShapeDtypeStruct(_aval(v).shape, _aval(v).dtype) for v in residuals]
    index = {v: i for i, v in enumerate(early_in)}
    return SplitFunction(first, second, shapes, [index.get(v) for v in residuals], (one, two))


def _inline(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with each call replaced by the equations of the called function."""
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


def _assign(
    jaxpr: core.Jaxpr, now: Sequence[Any], known: Sequence[Any], early: Sequence[Any], late: Sequence[Any]
) -> tuple[dict[core.Var, str], list[str]]:
    """Assign each variable and each equation: `known` (in both parts), `early` or `late`."""
    needed = {id(eqn) for eqn in _live(jaxpr, now, ["known"] * len(jaxpr.eqns), "early")[0]}
    place = dict.fromkeys((*jaxpr.constvars, *known), "known")
    place |= dict.fromkeys(early, "early") | dict.fromkeys(late, "late")
    places = []
    for eqn in jaxpr.eqns:
        fresh = [v for v in _vars(eqn.invars) if place[v] != "known"]
        if any(place[v] == "late" for v in fresh):
            assert id(eqn) not in needed, f"{eqn.primitive} is needed now, but depends on a late argument"
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
    jaxpr: core.Jaxpr, targets: Iterable[Any], places: Sequence[str], part: str
) -> tuple[list[core.JaxprEqn], dict[core.Var, None]]:
    """The equations of a part that lead to `targets` or have effects; and all variables that they use."""
    wanted, live = _vars(targets), []
    for eqn, place in zip(reversed(jaxpr.eqns), reversed(places), strict=True):
        acts = place == part and bool(eqn.effects)
        if acts or (place in (part, "known") and any(v in wanted for v in eqn.outvars)):
            live.append(eqn)
            wanted |= _vars(eqn.invars)
    return live[::-1], wanted


def _heavy(eqn: core.JaxprEqn) -> bool:
    return eqn.primitive.name in _HEAVY or any(True for _ in core.jaxprs_in_params(eqn.params))


def _bytes(variables: Iterable[core.Var]) -> int:
    return sum(_aval(v).size * _aval(v).dtype.itemsize for v in variables)


def _aval(variable: core.Var) -> Any:
    """Its shape and dtype. Typed as `Any`, because an abstract value of JAX need not have them."""
    return variable.aval


def _vars(atoms: Iterable[Any]) -> dict[core.Var, None]:
    """The variables among atoms, each once, in order."""
    return {atom: None for atom in atoms if not isinstance(atom, core.Literal)}


def _partition(items: Sequence[Any], *at: int) -> list[Sequence[Any]]:
    return [items[a:b] for a, b in zip((0, *at), (*at, len(items)), strict=True)]
