"""Every way to end a run at every stage: nothing is lost, nothing incomplete is resumed, and the messages help."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from endings import FULL_AT_STAGE, NAN, SIGNALLED, STAGES

HERE = Path(__file__).parent
MOUNTS = ["unshare", "--map-root-user", "--mount"]  # where this is allowed, anyone may mount a tmpfs


def mounts():
    return (
        shutil.which(MOUNTS[0]) is not None and subprocess.run([*MOUNTS, "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="module")
def endings():
    command = [sys.executable, str(HERE / "endings.py")]
    if mounts():
        command = [*MOUNTS, *command, "--disks"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def one(endings, way, stage):
    (found,) = [ending for ending in endings if (ending["way"], ending["stage"]) == (way, stage)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("way", "stage"), SIGNALLED)
def test_a_run_ended_by_a_signal_resumes_bit_for_bit(endings, stage, way):
    ending = one(endings, way, stage)
    expected = {"error": "KeyboardInterrupt"} if way == "SIGINT" else {"signal": way}
    assert expected.items() <= ending["ended"].items(), ending["ended"]
    assert ending["left"] == STAGES[stage][-1]
    assert ending["again"] == {"result": ending["whole"]}


@pytest.mark.slow
def test_a_run_killed_again_and_again_in_its_saves_resumes_bit_for_bit(endings):
    killed = [ending for ending in endings if ending["way"] == "killed in saves"]
    assert [ending["again"] for ending in killed] == [{"result": ending["whole"]} for ending in killed]
    assert any(ending["half_written"] for ending in killed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", NAN)
def test_nothing_of_a_nan_is_kept_and_the_run_resumes_from_before_bit_for_bit(endings, stage):
    ending = one(endings, "NaN", stage)
    step, left = NAN[stage]
    assert ending["ended"]["error"] == "FloatingPointError", ending["ended"]
    assert re.search(rf"step {step}\b.*The last whole checkpoint is \S+/checkpoint-{left}\b", ending["ended"]["said"])
    assert ending["left"] == left
    assert ending["again"] == {"result": ending["whole"]}


def names_the_checkpoint_to_resume_from(ending):
    ended = ending["ended"]
    assert ended["error"] == "OSError", ended
    last = re.search(r"The last whole checkpoint is \S+/checkpoint-(\d+)\. Make room, and resume", ended["said"])
    assert (int(last[1]) if last else 0) == ending["left"], ended["said"]
    assert ending["again"] == {"result": ending["whole"]}


@pytest.mark.slow
@pytest.mark.parametrize("stage", FULL_AT_STAGE)
def test_a_failed_write_is_explained_and_the_run_resumes_bit_for_bit(endings, stage):
    ending = one(endings, "played full disk", stage)
    folder = "" if stage == "as the folder is taken" else "/checkpoint-8"
    assert re.search(rf"\d+{folder} could not be written: .+", ending["ended"]["said"])
    assert ending["left"] == STAGES[stage][-1]
    names_the_checkpoint_to_resume_from(ending)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_file_is_explained_and_the_run_resumes_bit_for_bit(endings):
    full = [ending for ending in endings if ending["way"] == "a full disk"]
    if not full:
        pytest.skip("this machine does not allow mounting a tmpfs in a namespace of its own")
    files = set()
    for ending in full:
        said = ending["ended"]["said"]
        directory, name, free = re.search(
            r"\] (\S+) could not .* with (\S+) as the last file\. (\S+ \w+) are free", said
        ).groups()
        assert directory.endswith("checkpoint-4" if ending["left"] == 0 else "checkpoint-8")
        assert free.split()[1] in ("bytes", "kB")
        files.add(name)
        names_the_checkpoint_to_resume_from(ending)
    assert {ending["left"] for ending in full} == {0, 4}
    assert {"sparsity_config.json", "optimizer.pt"} <= files  # the disk was too small for masks, and for moments
    # the size of the second checkpoint is known from the first
    needed = [ending["ended"]["said"] for ending in full if ending["left"] == 4]
    assert all(re.search(r"about [\d.]+ kB more are needed: the whole takes about \d+ kB", said) for said in needed)
