"""What ends together ends completely, and the first error is the one that is seen."""

import pytest

from shardtrain import UserError
from shardtrain.host.closing import close_all


def fails(error: BaseException):
    def close() -> None:
        raise error

    return close


def test_every_call_is_made_and_the_first_error_raised(caplog):
    made = []
    with pytest.raises(UserError, match="first"):
        close_all(
            lambda: made.append(1),
            fails(UserError("first")),
            fails(OSError(28, "No space left on device")),
            fails(KeyError("a bug")),
            lambda: made.append(2),
        )
    assert made == [1, 2]
    disk, bug = caplog.records
    assert disk.getMessage() == "[Errno 28] No space left on device"
    assert disk.exc_info is None
    assert bug.getMessage() == "KeyError"
    assert "a bug" in caplog.text, "a bug is logged with its traceback"


@pytest.mark.parametrize("later", [UserError("later"), KeyboardInterrupt()])
def test_beside_an_error_that_is_being_raised_nothing_is(later, caplog):
    close_all(fails(later), after=ValueError("first"))
    assert len(caplog.records) == 1


def test_without_errors_nothing_is_said(caplog):
    close_all(lambda: None, after=ValueError("first"))
    close_all(lambda: None)
    assert caplog.records == []
