"""Who installed the wheel has the presets and the templates, and runs the command from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_runs_on_its_own(tmp_path):
    source = tmp_path / "source"  # a copy, for a build leaves files behind
    for name in ("hf_chts", "configs", "studies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *map(str, options)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    expected = {path.relative_to(source) for path in (source / "hf_chts").rglob("*") if path.is_file()}
    expected |= {"hf_chts" / path.relative_to(source) for path in (source / "configs").rglob("*") if path.is_file()}
    expected |= {Path("hf_chts/study_files", path.name) for path in (source / "studies").glob("*.yaml")}
    installed = tmp_path / "installed"
    found = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    assert {path for path in found if path.parts[0] == "hf_chts"} == expected
    assert "hf-chts = hf_chts.__main__:program" in next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    # parses the preset and its model, and ends over the dataset, before anything is downloaded or written
    command = [sys.executable, "-m", "hf_chts", "train", "--config", "llama_60m", "--use_cpu", "true"]
    done = subprocess.run(
        [*command, "--dataset", "nowhere.txt", "--tokenizer", "embedded", "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hf-chts train: ")
    assert "nowhere.txt" in done.stderr.splitlines()[-1]
    page = [sys.executable, "-m", "hf_chts", "study", "classification", "--page"]
    subprocess.run(page, check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)})
    assert (tmp_path / "studies/results/classification/classification.md").is_file()
