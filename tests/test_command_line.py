"""A run from YAML and options: types, precedence, and what is refused."""

from pathlib import Path

import pytest

from hf_chts import SparseTrainingArguments, SparsityConfig
from hf_chts.command_line import parse_run
from hf_chts.data import DataArguments
from hf_chts.methods import METHODS
from hf_chts.model_arguments import ModelArguments, load_config

ROOT = Path(__file__).parents[1]
KINDS = (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments)
RUNS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def parse(*argv, config=None):
    return parse_run(KINDS, argv, default_config=config or ROOT / "configs/demo.yaml", description="")


def test_the_demo():
    model, data, sparsity, args = parse()
    assert (sparsity.method, sparsity.sparsity, sparsity.update_interval) == ("chtss", 0.9, 10)
    assert data.dataset == "embedded"
    assert args.learning_rate == 3e-3
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert args.use_cpu is False  # it takes what is there
    assert (ROOT / model.model).is_file()


def test_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 3e-4\nmethod: set\ntarget_modules: [q_proj, k_proj]\n"
        "bf16: true\nuse_cpu: true\nmax_steps: 1000\n"
    )
    for argv in (["--config", str(file)], [f"--config={file}"]):
        _, _, sparsity, args = parse(*argv, "--method", "chts", "--max_steps", "2000", "--output_dir", str(tmp_path))
        assert args.learning_rate == 3e-4  # YAML reads it as text
        assert sparsity.method == "chts"
        assert sparsity.target_modules == ["q_proj", "k_proj"]
        assert args.bf16 is True
        assert args.max_steps == 2000


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("method", METHODS)
def test_every_config_with_every_method(tmp_path, run, method):
    # on the CPU because TrainingArguments refuse bf16 where there is neither a GPU nor use_cpu
    argv = ["--method", method, "--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, _, sparsity, args = parse(*argv, config=ROOT / "configs" / run)
    assert load_config(model, ROOT).model_type == "llama"
    assert sparsity.method == method
    plan = sparsity.plan(args.max_steps)
    assert plan.sparsity(plan.last_update) == sparsity.sparsity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"unknown field 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("- 1", "holds a list; a run is a mapping"),
        ("a: [", "is not valid YAML"),
        ("sparsity: 1.5", "sparsity is 1.5"),
        ("update_warmup_steps: -1", "update_warmup_steps is -1"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file), "--output_dir", str(tmp_path))


def test_bad_options(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there is no config file nowhere.yaml"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(ValueError, match=r"unknown option --methd \(did you mean 'method'\?\)"):
        parse("--methd", "set")
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 8.5")
    with pytest.raises(SystemExit):
        parse("--config", str(file))
    assert "argument --max_steps" in capsys.readouterr().err
