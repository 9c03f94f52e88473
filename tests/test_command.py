"""What the commands share."""

import os

import pytest

from minibooth import command


def test_commands_ask_for_huge_pages_unless_told_otherwise(monkeypatch):
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
        if given is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        with pytest.raises(SystemExit, match="0"):
            command.run(lambda argv: None, ["train.py"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == wanted
