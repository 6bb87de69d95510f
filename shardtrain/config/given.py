"""What stands in a config for a model and for rows that a program passes itself, as `shardtrain.fit` does.

Such a config is stored with the run and says all the rest. Alone it cannot start one.
"""

from __future__ import annotations

from typing import Any

from shardtrain.errors import UserError

MODEL, DATA = f"{__name__}:GivenModel", f"{__name__}:GivenRows"


class GivenModel:
    """A model that a program passes.

    Args:
      name: of its class.
      parameters: how many it has.
      vocab_size: above all token ids of its data; 1 where there are none.

    Raises:
      UserError: always.
    """

    def __init__(self, *, name: str, parameters: int, vocab_size: int):
        refuse_alone(MODEL)


class GivenRows:
    """Rows that a program passes.

    Raises:
      UserError: always.
    """

    def __init__(self, **_: Any):
        refuse_alone(DATA)


def refuse_alone(type: str) -> None:
    """Refuse to build what only a program has.

    Raises:
      UserError: the type of a config's model or data stands for such a thing.
    """
    if type in (MODEL, DATA):
        key, what = ("model.type", "the model") if type == MODEL else ("data.type", "the data")
        raise UserError(key, type, f"{what} was passed by the program that started this run", "run that program again")
