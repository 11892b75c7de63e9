"""Files and directories that are written whole or not at all, on a full disk too, and errors about damaged ones."""

import errno
import os
import shutil
from collections import namedtuple

import pytest
import transformers.modeling_utils
from safetensors import SafetensorError
from tiny import tiny_llama

from hf_chts import SparsityConfig, export_sparse, load_sparse, sparsify
from hf_chts.files.atomic import whole_directory, write_whole
from hf_chts.files.full_disk import explain_failed_write
from hf_chts.files.reading import read_json, reading

Usage = namedtuple("Usage", "total used free")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raised(directory, error, **more):
    with (
        pytest.raises(OSError, match="could not be written") as told,
        explain_failed_write(directory, "What next", **more),
    ):
        raise error
    return told.value


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (FULL, errno.ENOSPC),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), errno.EDQUOT),
        (SafetensorError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.ENOSPC),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), errno.ENOSPC),
        (RuntimeError("basic_ios::clear: iostream error"), errno.ENOSPC),
    ],
)
def test_what_is_missing_is_what_is_needed_less_what_is_written_and_free(tmp_path, monkeypatch, error, number):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 200_000, 200_000))
    (tmp_path / "part").mkdir()
    (tmp_path / "part/first").write_bytes(b"x" * 50_000)
    (tmp_path / "second").write_bytes(b"x" * 250_000)
    os.utime(tmp_path / "part/first", (1, 1))
    told = raised(tmp_path, error, needs=lambda: 1_000_000)
    assert told.errno == number
    for said in (str(tmp_path), "second as the last file", "200 kB are free", "500 kB more are needed", "about 1 MB"):
        assert said in str(told)
    assert str(told).endswith("What next")
    assert told.__cause__ is error
    # not known, or enough by now
    assert "more are needed" not in str(raised(tmp_path, error))
    assert "more are needed" not in str(raised(tmp_path, error, needs=lambda: 400_000))


def test_other_errors_pass_as_they_are(tmp_path):
    for error in (ValueError("no"), RuntimeError("size mismatch"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as found, explain_failed_write(tmp_path):
            raise error
        assert found.value is error
    # of a write, and not of a full disk: space is no matter then
    told = raised(tmp_path, OSError(errno.EACCES, "Permission denied", "there"))
    assert isinstance(told, PermissionError)
    assert "free" not in str(told)


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    target = tmp_path / "parent/new"

    def interrupted():
        with whole_directory(target) as new:
            (new / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert list(tmp_path.rglob("*")) == [tmp_path / "parent"]
    target.mkdir()  # an empty one is replaced
    with whole_directory(target) as new:
        (new / "file").write_text("all")
        assert not list(target.iterdir())
    with pytest.raises(FileExistsError, match="not an empty directory"), whole_directory(target):
        pass
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["all"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it holds a list"),
        ('{"format": "other"}', "its format is 'other', and this version of hf_chts reads 'mine'"),
        ('{"format": "mine"}', "it has no 'step'"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, text, reason):
    path = tmp_path / "state.json"
    path.write_text(text)
    with (
        pytest.raises(ValueError, match=rf"state\.json cannot be used: {reason}.*\. Take another"),
        reading(path, "Take another"),
    ):
        assert read_json(path, "mine")["step"]


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
def test_a_file_that_could_not_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, error):
    def fail(descriptor):
        raise error

    write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as found:
        write_whole(tmp_path / "file", b"new")
    if error is FULL:
        assert found.value.filename == str(tmp_path / "file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


@pytest.mark.parametrize("packed", [False, True])
def test_an_export_that_finds_the_disk_full_can_be_done_again(tmp_path, monkeypatch, packed):
    model = tiny_llama(num_hidden_layers=1)
    sparsify(model, SparsityConfig(method="static"))
    export_sparse(model, tmp_path / "whole", packed=packed)

    def weights(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", weights)
        with pytest.raises(OSError, match=r"\[Errno 28\] .*export could not be written: .*export it again"):
            export_sparse(model, tmp_path / "export", packed=packed)
    with monkeypatch.context() as patch:
        writes = Writes(patch, os.fsync)
        export_sparse(model, tmp_path / "counted", packed=packed)
        assert writes.count >= 2  # weights and masks packed, or masks and their like
        for number in range(1, writes.count + 1):
            writes.fail_at(number)
            said = f"{tmp_path}/export could not be written: .*No space left on device: '.+'"  # the file
            with pytest.raises(OSError, match=said):
                export_sparse(model, tmp_path / "export", packed=packed)
            assert not list(tmp_path.rglob(".*"))  # what was begun is gone
    export_sparse(model, tmp_path / "export", packed=packed)
    whole, again = ({p.name: p.stat().st_size for p in (tmp_path / name).iterdir()} for name in ("whole", "export"))
    assert again == whole
    loaded = load_sparse(tmp_path / "export").state_dict()
    assert all(loaded[name].equal(value) for name, value in model.state_dict().items())


class Writes:
    """Counts the files that are written whole, or finds the disk full at one of them."""

    def __init__(self, patch, fsync):
        self.count, self.full_at, self.fsync = 0, None, fsync
        patch.setattr(os, "fsync", self)

    def fail_at(self, number):
        self.count, self.full_at = 0, number

    def __call__(self, descriptor):
        self.count += 1
        if self.count == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.fsync(descriptor)
