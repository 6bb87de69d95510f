"""Which activations of a block are kept for the backward pass, and which it computes again.

A layer marks an activation with `checkpoint_name`; a policy says which of these are kept, on the device or the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from shardtrain.errors import UserError, did_you_mean

Remat = str | Sequence[str]

#: Activations that the layers of this package name, in the order of the forward pass.
ACTIVATIONS = ("query", "key", "value", "attn_mixed", "attn_out", "mlp_gate", "mlp_up")
_WORDS = ("none", "full", "dots", "offload")


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """Make a `jax.checkpoint` policy that says what is kept for the backward pass; `None` keeps everything.

    Args:
      remat: `none` keeps all; `full` only the input of each block; `dots` the results of matmuls with weights;
        `names:a,b`, or a list of names, the activations that the block marked with `checkpoint_name` (our layers:
        `ACTIVATIONS`). `offload` is `dots` and `offload:a,b` is `names:a,b`, kept in host memory. (On CPU that is the
        same memory: no gain.)

    Raises:
      UserError: the word is another one, or the list of names is empty.
    """
    policies = jax.checkpoint_policies
    word, names = _parse(remat)
    if names and word == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=names,
            offload_src="device",
            offload_dst="pinned_host",
        )
    if names:
        return policies.save_only_these_names(*names)
    known = {
        "none": None,
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }
    return known[word]


def rematerialized(body: Callable[..., Any], remat: Remat, *, in_scan: bool = True) -> Callable[..., Any]:
    """Wrap a function so that its backward pass keeps what `remat` says.

    Raises:
      UserError: nothing in the function has one of the names; raised when it is traced.
    """
    policy, names = remat_policy(remat), _parse(remat)[1]
    if policy is None:
        return body
    # Within a scan the loop itself keeps XLA from undoing the rematerialisation.
    saving = jax.checkpoint(body, policy=policy, prevent_cse=not in_scan)
    if not names:
        return saving

    def checked(*args: Any) -> Any:
        check_names(names, set(_named(jax.make_jaxpr(body)(*args).jaxpr)))
        return saving(*args)

    return checked


def check_names(names: Sequence[str], known: Sequence[str] | set[str]) -> None:
    """Compare the names to keep with those that exist.

    Raises:
      UserError: one does not exist; names the nearest that does.
    """
    for name in names:
        if name not in known:
            raise UserError(
                f"remat keeps {name!r}, but no activation of the block has this name; "
                + (did_you_mean(name, sorted(known)) if known else "mark some with checkpoint_name")
            )


def remat_names(remat: Remat) -> list[str]:
    """Return the names that `remat` lists; none for a word.

    Raises:
      UserError: see `remat_policy`.
    """
    return _parse(remat)[1]


def _parse(remat: Remat) -> tuple[str, list[str]]:
    if not isinstance(remat, str):
        word, names, listed = "names", list(remat), True
    else:
        word, colon, rest = remat.partition(":")
        listed = bool(colon) and word in ("names", "offload")
        names = [name.strip() for name in rest.strip("[] ").split(",")] if listed else []
    if listed and not (names and all(names)):
        raise UserError(f"remat {remat!r} lists no names; give some, or use full to keep only the inputs")
    if not listed and remat not in _WORDS:
        near = did_you_mean(str(remat), [*_WORDS, "names:a,b", "offload:a,b"])
        raise UserError(f"remat {remat!r} is not a policy; {near}")
    return word, names


def _named(jaxpr: Any) -> Iterator[str]:
    """Yield the names in a traced program and in the programs within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"]
        for value in jax.tree.leaves(equation.params, is_leaf=_is_program):
            if _is_program(value):
                yield from _named(getattr(value, "jaxpr", value))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
