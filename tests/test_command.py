"""What the commands share."""

import ctypes
import os
import subprocess
import sys

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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_memory_that_is_free_is_kept():
    """Where the system took it back, the next tensor would fault page by page."""
    lines = (
        "command.ready_cpu()",
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20",
        "before = held(); x = torch.ones(1 << 26); del x; print(held() - before)",
    )
    words = [sys.executable, "-c", "; ".join(("import resource, torch", "from minibooth import command", *lines))]
    assert int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) > 250


def test_numbers_too_small_to_be_normal_count_as_zero():
    """In every thread: products with them take ten times as long."""
    lines = (
        "command.ready_cpu(); torch.set_num_threads(2)",
        "print((torch.full((1 << 20,), 1e-38) * 0.1).count_nonzero().item())",
    )
    words = [sys.executable, "-c", "; ".join(("import torch", "from minibooth import command", *lines))]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "0\n"
