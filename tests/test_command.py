"""What the commands share."""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minibooth import __main__, command
from minibooth.checkpoint import files
from minibooth.dreambooth.trainer import interrupts
from minibooth.errors import Terminated, UserError


def test_commands_ask_for_huge_pages_unless_told_otherwise(monkeypatch):
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", given or "")
        if given is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        with pytest.raises(SystemExit, match="0"):
            command.run(lambda argv: None, ["train.py"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == wanted


@pytest.mark.parametrize("name, given, wanted", [
    ("PYTORCH_ALLOC_CONF", "", "expandable_segments:True"), ("PYTORCH_ALLOC_CONF", "backend:native", "backend:native"),
    ("PYTORCH_CUDA_ALLOC_CONF", "backend:native", "backend:native"),
])  # fmt: skip
def test_commands_ask_for_a_gpus_memory_without_gaps_unless_told_otherwise(name, given, wanted, monkeypatch):
    """By the name of today or of before."""
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(each, "")  # and so put back as it was
        monkeypatch.delenv(each)
    if given:
        monkeypatch.setenv(name, given)
    command.ready_torch()
    assert os.environ["PYTORCH_ALLOC_CONF"] == wanted


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's")
def test_memory_that_is_free_is_kept():
    """Where the system took it back, the next tensor would fault page by page."""
    lines = (
        "command.ready_torch()",
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() >> 20",
        "before = held(); x = torch.ones(1 << 26); del x; print(held() - before)",
    )
    words = [sys.executable, "-c", "; ".join(("import resource, torch", "from minibooth import command", *lines))]
    assert int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) > 250


def test_numbers_too_small_to_be_normal_count_as_zero():
    """In every thread: products with them take ten times as long."""
    lines = (
        "command.ready_torch(); torch.set_num_threads(2)",
        "print((torch.full((1 << 20,), 1e-38) * 0.1).count_nonzero().item())",
    )
    words = [sys.executable, "-c", "; ".join(("import torch", "from minibooth import command", *lines))]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "0\n"


def test_a_folder_is_made_with_those_above_it(tmp_path):
    for _ in range(2):
        command.ready_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir() and not [*(tmp_path / "a" / "b").iterdir()]


def test_flags_are_alike_in_either_spelling_and_values_stay():
    argv = ["--num-images", "4", "--a-b=c-d=e-f", "-x-y", "a-b", "--num_images=a_b", "--", "--", "--a-b=~/c-d", "~"]
    expected = ["--num_images", "4", "--a_b=c-d=e-f", "-x-y", "a-b", "--num_images=a_b", "--", "--"]
    assert command.normalise(argv) == [*expected, f"--a_b={Path.home()}/c-d", str(Path.home())]


@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_taken_unless_one_is_named(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)  # not so where the driver is too old for this PyTorch
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert command.device() == torch.device(best)
    assert command.device("cpu") == torch.device("cpu")
    for name in ["cuda:2", "cuda:x", "cpu:x", "cpu:-1"] + ["cuda:0"] * (not cuda):
        with pytest.raises(UserError, match=f"{name} is not there; {'cuda, cuda:0, cuda:1' if cuda else best}.* would do"):
            command.device(name)
    assert not cuda or command.device("cuda:1") == torch.device("cuda", 1)


# ---- the process


def test_a_run_ends_as_a_process_should(capsys):
    def raising(error):
        def main(argv):
            raise error

        return main

    ends = [
        (UserError("a\nb"), 2, "a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(), 143, "terminated"),
        (OSError(28, "full", "x"), 2, "full: x"),
        (OSError(36, "File name too long", "new", None, "x"), 2, "File name too long: x"),
        (OSError(2, "No such file", "x\udcff"), 2, "No such file: x\\udcff"),
        (MemoryError(), 2, "not enough memory: take a smaller size or batch"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "smaller size or batch; CUDA out of memory. Tried"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "DefaultCPUAllocator: can't allocate memory"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, "smaller size or batch; CUBLAS_STATUS_ALLOC_FAILED"),
    ]
    for error, status, line in ends:
        with pytest.raises(SystemExit) as end:
            command.run(raising(error), ["/a/train.py"])
        assert end.value.code == status
        printed = capsys.readouterr().err
        assert printed.startswith("minibooth.train: ") and printed.endswith(f"{line}\n") and printed.count("\n") == 1
    for bug in (ZeroDivisionError(), RuntimeError("shapes"), OSError("ours")):  # keeps its traceback
        with pytest.raises(type(bug)):
            command.run(raising(bug), ["/a/train.py"])
    with pytest.raises(SystemExit) as end:
        command.run(lambda argv: None, ["/a/train.py"])
    assert not end.value.code


def test_sigterm_cleans_up_as_ctrl_c_does(tmp_path, capsys):
    def main(argv):
        with files.replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="143"):
            command.run(main, ["convert.py"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "minibooth.convert: terminated\n"
    assert not list(tmp_path.iterdir())


def test_an_error_cannot_write_over_the_terminal(capsys):
    """What it names may be a stranger's."""

    def mistaken(argv):
        raise UserError("unet has unexpected ü\x1b[2J\u202ex\x07, 犬")

    with pytest.raises(SystemExit, match="2"):
        command.run(mistaken, ["x.py"])
    assert capsys.readouterr().err == "minibooth.x: error: unet has unexpected ü\\x1b[2J\\u202ex\\x07, 犬\n"


def test_a_signal_that_is_ignored_stays_ignored():
    """So that a script's background job outlives the Ctrl-C that ends the script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            command.ready_process()
            with interrupts():
                assert signal.getsignal(number) == signal.SIG_IGN
            assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)


TALK = """
from tqdm import tqdm
from minibooth import command
command.run(lambda argv: [print(i, "\\xfc \\udcff") for i in tqdm(range(9999))], ["x.py"])
"""


def test_nobody_to_read_what_is_printed_ends_a_command_quietly():
    with subprocess.Popen([sys.executable, "-c", TALK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.returncode == 141


def test_any_words_can_be_printed_in_any_locale_even_with_stderr_closed():
    words = ["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-c", TALK]
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(words, stdout=subprocess.PIPE, env=plain)
    assert done.returncode == 0 and done.stdout.splitlines()[7] == rb"7 \xfc \udcff"


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_a_command_is_a_module_that_runs(name, monkeypatch, capsys):
    path = Path(command.__file__).with_name(f"{name}.py")
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m minibooth.{name} ")


def test_ctrl_c_among_the_imports_ends_a_command_quietly(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    where = dict(cwd=Path(command.__file__).parents[1], env=os.environ | {"PYTHONPATH": str(tmp_path)})
    where["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    done = subprocess.run([sys.executable, "-m", "minibooth.train", "--rank=4"], capture_output=True, **where)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


# ---- the package


def test_the_package_lists_its_commands(capsys):
    __main__.main()
    listed = capsys.readouterr().out
    modules = [path for path in Path(__main__.__file__).parent.glob("[!_]*.py") if "\ndef main(" in path.read_text()]
    assert {path.stem for path in modules} == {*__main__.COMMANDS}
    for path in modules:
        line = path.read_text().splitlines()[0].strip('"')
        assert f"python -m minibooth.{path.stem}" in listed and line in listed


def test_nobody_to_read_the_list_is_no_error():
    words = f"{sys.executable} -m minibooth | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, cwd=Path(__file__).parents[1])
    assert done.returncode in (0, 141) and done.stderr == b""


@pytest.mark.parametrize("word, remedy", [("train", "use python -m minibooth.train\n"), ("x", "one of train, generate")])
def test_the_package_takes_no_words(word, remedy, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main([word, "--rank", "4"])
    said = capsys.readouterr()
    assert not said.out and remedy in said.err and said.err.count("\n") == 1
