"""A run from YAML and options: types, precedence, and what is refused."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_chts import SparseTrainingArguments, SparsityConfig
from hf_chts.__main__ import main
from hf_chts.commands.options import parse_run
from hf_chts.commands.train import checkpoint_to_resume
from hf_chts.config_file import read_mapping
from hf_chts.data import DataArguments
from hf_chts.data.embedded import train_byte_level_bpe
from hf_chts.data.holdout import Holdout
from hf_chts.data.token_files import TokenIndex
from hf_chts.methods import METHODS
from hf_chts.model_arguments import ModelArguments, load_config

ROOT = Path(__file__).parents[1]
KINDS = (ModelArguments, DataArguments, SparsityConfig, SparseTrainingArguments)
RUNS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))


def parse(*argv, config=None):
    return parse_run(KINDS, argv, program="run", default_config=config or ROOT / "configs/demo.yaml", description="")


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
    file.write_text("learning_rate: 3e-4\nmethod: set\nbf16: true\nuse_cpu: true\nmax_steps: 1000\n")
    for argv in (["--config", str(file)], [f"--config={file}"]):
        _, _, sparsity, args = parse(*argv, "--method", "chts", "--max_steps", "2000", "--output_dir", str(tmp_path))
        assert (sparsity.method, args.max_steps, args.bf16, args.learning_rate) == ("chts", 2000, True, 3e-4)


# field: as YAML, as a command line, and what either gives
VALUES = {
    "sparsity": ("0.8", ["0.8"], 0.8),
    "adam_epsilon": ("1e-9", ["1e-9"], 1e-9),  # text in YAML 1.1
    "weight_decay": ("1", ["1"], 1.0),
    "seed": ("7", ["7"], 7),
    "percolation": ("true", ["true"], True),
    "bsf_resort": ("yes", [], True),
    "run_name": ("'7'", ["7"], "7"),
    "resume_from_checkpoint": ("true", ["True"], True),
    "lr_scheduler_kwargs": (
        "{min_lr: 1e-4, name: x}",
        ['{"min_lr": 1e-4, "name": "x"}'],
        {"min_lr": 1e-4, "name": "x"},
    ),
    "layer_sparsity": ("{down_proj: 0.95}", ['{"down_proj": 0.95}'], {"down_proj": 0.95}),
    "liger_kernel_config": ("{rope: true}", ['{"rope": true}'], {"rope": True}),
    "target_modules": ("[q_proj, k_proj]", ["q_proj", "k_proj"], ["q_proj", "k_proj"]),
    "exclude_modules": ("q_proj", ["q_proj"], ["q_proj"]),
    "max_eval_tokens": ("null", ["null"], None),
    "on_bad_document": ("null", ["null"], None),
    "label_names": ("null", ["null"], None),
    "save_total_limit": ("", ["null"], None),  # nothing is null, too
    "eval_strategy": ("'no'", ["no"], "no"),
    "packing": ("truncate_and_pad", ["truncate_and_pad"], "truncate_and_pad"),
}


def test_types_of_values(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{name}: {text}\n" for name, (text, _, _) in VALUES.items()))
    options = [word for name, (_, words, _) in VALUES.items() for word in (f"--{name}", *words)]
    for argv in (["--config", str(file)], options):
        found = {
            name: value for part in parse(*argv, "--output_dir", str(tmp_path)) for name, value in vars(part).items()
        }
        for name, (_, _, value) in VALUES.items():
            given = found[name]
            if name == "resume_from_checkpoint":
                given = checkpoint_to_resume(SimpleNamespace(resume_from_checkpoint=given))
            assert given == value, name
            assert isinstance(given, type(value)), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 8.5", "max_steps is 8.5; it must be a whole number"),
        ("max_steps: true", "max_steps is true; it must be a whole number"),
        ("max_steps: null", "max_steps is null; it must be a whole number"),
        ("learning_rate: '3e-4'", 'learning_rate is "3e-4"; it must be a number: leave out the quotes'),
        ("streaming: perhaps", 'streaming is "perhaps"; it must be true or false'),
        ("run_name: 7", "run_name is 7; it must be text: put it in quotes"),
        ("eval_strategy: no", "eval_strategy is false; it must be text: put it in quotes, YAML reads"),
        ("target_modules: {a: 1}", r'target_modules is \{"a": 1\}; it must be a list'),
        ("eval_strategy: sometimes", "sometimes is not a valid IntervalStrategy"),
    ],
)
def test_wrong_types(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        parse("--config", str(file), "--output_dir", str(tmp_path / "out"))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", RUNS)
def test_every_config_with_every_method(tmp_path, run):
    # on the CPU because TrainingArguments refuse bf16 where there is neither a GPU nor use_cpu
    argv = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    model, _, config, args = parse(*argv, config=ROOT / "configs" / run)
    assert load_config(model).model_type == "llama"
    given = read_mapping(ROOT / "configs" / run, "a run")
    for method in METHODS:
        values = {name: given[name] for name in vars(config) if name in given} | {"method": method}
        # topk's missing links train, for which links storage has no room; its floor means nothing to others
        if (method == "topk" and "storage" in given) or (
            method not in ("topk", "dense", "static") and "neuron_links" in given
        ):
            with pytest.raises(ValueError, match="missing links"):
                SparsityConfig(**values)
            continue
        sparsity = SparsityConfig(**values)
        plan = sparsity.plan(args.max_steps)
        assert plan.sparsity(plan.last_update) == sparsity.sparsity
        assert (plan.last_update > 0) == (method not in ("dense", "static"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"unknown field 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("- 1", "holds a list; a run is a mapping"),
        ("a: [", "is not valid YAML"),
        ("max_steps: 5\n\nlr_scheduler_kwargs: {}\nmax_steps: 7", r"has 'max_steps' twice \(lines 1 and 4\)"),
        ("lr_scheduler_kwargs:\n  min_lr: 1\n  min_lr: 2\n", r"has 'min_lr' twice \(lines 2 and 3\)"),
        ("seed: 1\nlr_scheduler_kwargs:\n\tmin_lr: 1", r"in line 3: indent with spaces"),
        ("", "is empty; a run is a mapping"),
        ("seed: 1\n---\nseed: 2", "is not valid YAML"),
        ("seed: &it 1\ndata_seed: *it", "has the anchor or alias 'it' in line 1"),
        ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("[a]: 1", "has a key in line 1 that is not a name"),
        ("[" * 5000, "is not valid YAML"),
        ("sparsity: 1.5", "sparsity is 1.5"),
    ],
)
def test_bad_files(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        parse("--config", str(file), "--output_dir", str(tmp_path))
    assert str(file) in str(refused.value) or "is 1.5" in message


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_encodings(tmp_path, encoding):
    file = tmp_path / "run.yaml"
    file.write_bytes("seed: 5\nrun_name: für\n".encode(encoding))
    if encoding == "utf-8-sig":  # as editors on Windows write it
        assert parse("--config", str(file), "--output_dir", str(tmp_path))[3].run_name == "für"
        return
    line = 2 if encoding == "latin-1" else 1
    with pytest.raises(ValueError, match=rf"run.yaml is not UTF-8 \(line {line}\)"):
        parse("--config", str(file), "--output_dir", str(tmp_path))


def test_json_is_as_strict(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"seed": 5, "learning_rate": 1e-3,\n\t"lr_scheduler_kwargs": {"min_lr": 0.1}}')
    args = parse("--config", str(file), "--output_dir", str(tmp_path))[3]
    assert (args.seed, args.learning_rate, args.lr_scheduler_kwargs) == (5, 1e-3, {"min_lr": 0.1})
    for text, message in (
        ('{"seed": 1, "seed": 2}', "has 'seed' twice"),
        ('{"seed": 1', "is not valid JSON"),
        ("[1]", "holds a list"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"run.json {message}"):
            parse("--config", str(file), "--output_dir", str(tmp_path))
    # those of sparsity and of a model, too
    (tmp_path / "sparsity_config.json").write_text('{"method": "set", "sparsity": 0.9, "sparsity": 0.5}')
    with pytest.raises(ValueError, match="sparsity_config.json has 'sparsity' twice"):
        SparsityConfig.load(tmp_path)
    (tmp_path / "sparsity.yaml").write_bytes(b"method: set\n# \xfc")
    with pytest.raises(ValueError, match=r"sparsity.yaml is not UTF-8 \(line 2\)"):
        SparsityConfig.load(tmp_path / "sparsity.yaml")
    model = tmp_path / "model.json"
    model.write_text('{"model_type": "llama", "vocab_size": 512, "vocab_size": 32000}')
    with pytest.raises(ValueError, match="model.json has 'vocab_size' twice"):
        load_config(ModelArguments(model=str(model)))


def test_relative_paths(tmp_path, monkeypatch):
    """From the working directory, then from the config's own folder, and presets from anywhere."""
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "project/run.yaml"
    file.write_text(f"model: model.json\ndataset: corpus\ntokenizer: org/name\noutput_dir: {tmp_path}/out\n")
    (tmp_path / "project/corpus").mkdir()
    (tmp_path / "project/model.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    monkeypatch.chdir(tmp_path / "elsewhere")
    model, data, _, _ = parse("--config", "../project/run.yaml")
    assert Path(model.model).resolve() == tmp_path / "project/model.json"
    assert Path(data.dataset).resolve() == tmp_path / "project/corpus"
    assert data.tokenizer == "org/name"  # no path: a Hub id
    assert parse("--config", "../project/run.yaml", "--dataset", "corpus")[1].dataset == "corpus"  # not from the file
    (tmp_path / "elsewhere/corpus").mkdir()
    assert parse("--config", str(file))[1].dataset == "corpus"
    model, *_ = parse("--config", "configs/llama_60m.yaml", "--use_cpu", "true")
    assert model.model == "configs/models/llama_60m.json"
    assert load_config(model).hidden_size == 512
    assert parse("--config", "llama_60m", "--use_cpu", "true")[0] == model


def test_the_configs_can_be_copied_to_where_their_own_paths_lead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    zero = read_mapping("configs/accelerate/zero3.yaml", "accelerate")
    assert Path(zero["deepspeed_config"]["deepspeed_config_file"]).is_file()
    Path("configs/demo.yaml").write_text("seed: 1")
    with pytest.raises(SystemExit, match="hf-chts configs: there is a configs here already"):
        main(["configs"])
    assert Path("configs/demo.yaml").read_text() == "seed: 1"


def prepare(*argv):
    main(["prepare", *map(str, argv)])


@pytest.fixture
def little(tmp_path):
    """A run's config with keys of every kind, its corpus and its model beside it, and a tokenizer."""
    project = tmp_path / "project"
    (project / "texts").mkdir(parents=True)
    for n in range(20):
        (project / f"texts/{n}.txt").write_text(f"text {n} " * 9)
    train_byte_level_bpe([""], 257).save_pretrained(project / "letters")
    (project / "model.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 257}))
    # what training alone can refuse is not prepare's affair
    (project / "run.yaml").write_text(
        "model: model.json\ndataset: texts\ntokenizer: letters\nvalidation_fraction: 2e-1\nseed: 3\n"
        "method: chtss\nlearning_rate: 3e-4\nbf16: true\nmax_steps: 8\nblock_size: 64\n"
    )
    return project / "run.yaml"


def test_prepare_reads_a_config_as_training_does(tmp_path, little, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare("--config", little, "--out", tmp_path / "out", "--workers", 1)
    texts = [path.read_text() for path in (little.parent / "texts").iterdir()]
    held_out = sum(map(Holdout(0.2, 3), texts))
    assert 0 < held_out < 20
    assert f"of {held_out} documents" in capsys.readouterr().out
    index = TokenIndex.load(tmp_path / "out")
    assert sum(shard.documents for shard in index.splits["train"]) == 20 - held_out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datset: /my/corpus", r"has an unknown field 'datset' \(did you mean 'dataset'\?\)"),
        ("learning_rat: 1", r"did you mean 'learning_rate'\?"),  # not a field of prepare, but of the file
        ("packing: tight", "packing='tight'"),
        ("block_size: 8.5", "block_size is 8.5"),
    ],
)
def test_prepare_refuses_what_training_does(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    for read in (
        lambda: prepare("--config", file, "--out", tmp_path / "out"),
        lambda: parse("--config", str(file), "--output_dir", str(tmp_path)),
    ):
        with pytest.raises((SystemExit, ValueError), match=message) as refused:
            read()
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_bad_options(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"no config file nowhere.yaml: .* a preset \(demo, demo_topk, llama_1"):
        parse("--config", "nowhere.yaml")
    with pytest.raises(ValueError, match=r"unknown option --methd \(did you mean 'method'\?\)"):
        parse("--methd", "set")
    with pytest.raises(SystemExit, match="hf-chts prepare: unknown option --block_size"):  # no token depends on it
        prepare("--out", tmp_path / "out", "--block_size", 64)
    for option, value in (("--max_steps", "8.5"), ("--lr_scheduler_kwargs", '{"min_lr": 1')):
        with pytest.raises(SystemExit) as end:
            parse(option, value)
        assert end.value.code == 2
        assert re.search(f"argument {option}/.*: invalid", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
