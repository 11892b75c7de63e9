"""What a program says of the machine it runs on, and what it checks before the part that takes its time."""

import io
import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from hf_chts import machine, plain_text
from hf_chts.commands import without_fail
from hf_chts.commands.app import main
from hf_chts.machine import check_can_write, device_line, device_name, on_cpu, version_of


@pytest.mark.parametrize(
    ("accelerator", "launcher", "expected"),
    [
        (None, None, True),
        ("cuda", None, False),
        ("cuda", "False", False),
        ("cuda", "true", True),  # accelerate launch with use_cpu: true
        ("xpu", None, False),
        ("mps", None, True),  # without float64
    ],
)
def test_a_run_takes_what_is_there(monkeypatch, accelerator, launcher, expected):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator and torch.device(accelerator))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if launcher is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", launcher)
    assert on_cpu() is expected


def test_the_line_names_device_number_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Model {torch.device(device).index}")
    assert device_line("cuda:1", dtype="float32") == "1 × Model 1 (cuda:1), float32"
    assert "4 × Model 0 (cuda:0), bf16" in device_line("cuda:0", processes=4, dtype="bf16")
    assert "7 more" in device_line("cuda:0", dtype="float32", unused=7)
    monkeypatch.setattr(machine, "device_name", lambda device: "Some Processor")
    threads = torch.get_num_threads()
    assert device_line("cpu", dtype="float32") == f"the CPU, Some Processor, {threads} thread, float32"
    assert "2 processes, 1 thread each" in device_line("cpu", processes=2, dtype="float32")


def test_a_device_that_does_not_say_what_it_is_called_is_its_type(monkeypatch):
    def broken(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    assert device_name("cuda:0") == "cuda"
    assert device_name("meta") == "meta"
    assert device_name("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_taken_and_named():
    assert not on_cpu()
    assert torch.cuda.get_device_name(0) in device_line("cuda:0", dtype="float32")


def test_a_version_that_cannot_be_found_is_unknown(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    assert version_of("torch") == metadata.version("torch")
    monkeypatch.setattr(machine.metadata, "version", missing)
    monkeypatch.setitem(sys.modules, "silent_package", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cloned_package", SimpleNamespace(__version__="1.2"))
    assert version_of("cloned_package") == "1.2"  # as a clone says itself
    assert version_of("silent_package") == version_of("no_such_package_at_all") == "unknown"
    monkeypatch.setattr(machine.metadata, "version", lambda name: None)  # metadata without that line
    assert version_of("silent_package") == "unknown"


def test_a_place_to_write_is_tried_before(tmp_path):
    check_can_write(tmp_path / "new" / "newer", "the export")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(OSError, match=f"the export {place} cannot be written to"):
            check_can_write(place, "the export")


def test_a_result_can_do_without():
    def fails():
        raise KeyError("of a library")

    assert without_fail("The figure", max, 3, 4) == (4, "")
    nothing, why = without_fail("The figure", fails)
    assert nothing is None
    assert "The figure" in why
    assert "KeyError" in why
    with pytest.raises(KeyboardInterrupt):  # who stops a program means it
        without_fail("The figure", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


def test_the_commands_print_on_any_console(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    main(["--help"])
    assert b"report" in stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("encoding", "errors", "printed"),
    [
        ("ascii", "strict", "-3 +-1 x ? ?"),
        ("ascii", "surrogateescape", "-3 +-1 x ? ?"),  # what LANG=C has
        ("cp1252", "strict", "-3 ±1 × ? ?"),
        ("utf-8", "strict", "−3 ±1 × 語 ?"),
    ],
)
def test_any_console_takes_any_text(monkeypatch, encoding, errors, printed):
    text = "−3 ±1 × 語 \udcff"  # the last is what Python makes of a file name that is no UTF-8
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True)
    assert plain_text.printable(text, stream) == printed
    monkeypatch.setattr(sys, "stdout", stream)
    plain_text.print_anything()
    print(text)
    assert stream.buffer.getvalue().decode(encoding) == f"{printed}\n"


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_that_is_done_is_not_aborted_by_its_threads(launched):
    """A thread of autograd's that is on its way back to Python when the script ends, as gloo's may be."""
    script = """
import atexit, threading, time, torch
from hf_chts.commands import end_rank
atexit.register(print, "hook")
started = threading.Event()
def slow(gradient):
    started.set()
    time.sleep(0.2)
x = torch.ones(2, requires_grad=True)
x.register_hook(slow)
threading.Thread(target=lambda: x.sum().backward(), daemon=True).start()
started.wait()
end_rank()
print("goes on")
"""
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    environment |= {"WORLD_SIZE": "2"} if launched else {}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.stdout == ("hook\n" if launched else "goes on\nhook\n")
    if launched:  # the other is aborted before Python 3.14
        assert result.returncode == 0, result.stderr
