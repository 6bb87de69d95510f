"""An import path leads to something, or the error says why not: the path's, or the module's own."""

import pytest

from shardtrain.errors import UserError
from shardtrain.host.import_path import find


@pytest.mark.parametrize("path", [":f", ".json:f", "a b:f", "json..tool:f"])
def test_what_is_not_the_name_of_a_module(path):
    with pytest.raises(UserError, match=r"is not the name of a module; write package\.module:function"):
        find(path, "function", "model.type")


def test_what_is_not_there_is_named_with_what_is():
    with pytest.raises(UserError, match=r"module json has no function 'load5'; did you mean load"):
        find("json:load5", "function", "model.type")
    with pytest.raises(UserError, match=r"importing module 'no_such_module' fails"):
        find("no_such_module:f", "function", "model.type")


@pytest.mark.parametrize(("code", "error"), [("int('x')", ValueError), ("len(3)", TypeError)])
def test_an_error_of_the_module_itself_is_not_taken_for_one_of_the_path(code, error, tmp_path, monkeypatch):
    (tmp_path / "broken_by_itself.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error) as raised:
        find("broken_by_itself:f", "function", "model.type")
    assert raised.value.__notes__[0].startswith("model.type = broken_by_itself:f: this error comes from there")
