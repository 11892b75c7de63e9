"""The run script, end to end as a user starts it, with a model that trains in seconds."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_chts.commands.train
from hf_chts import SparseTrainer, SparseTrainingArguments, load_sparse
from hf_chts.checkpoint import load_masks
from hf_chts.commands.train import train, use_all_cores, use_one_device
from hf_chts.export import directory
from hf_chts.topology.parts import REGROWTH

ROOT = Path(__file__).parents[1]
LAUNCH = [str(Path(sys.executable).parent / "accelerate"), "launch"]


def run(launcher, *options):
    return subprocess.run(
        [*launcher, str(ROOT / "train_llama.py"), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs would take all cores, from other tests too, which run beside them or after them in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_chts.commands.train, "use_all_cores", lambda args: None)
        yield


def started(*options):
    """Train in this process."""
    train([str(option) for option in options], program="train_llama.py")


def small(directory):
    """A config of a model and a corpus that train in seconds."""
    model = directory / "tiny.json"
    settings = json.loads((ROOT / "configs/models/llama_demo.json").read_text())
    settings |= {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "vocab_size": 512}
    model.write_text(json.dumps(settings))
    text = directory / "text"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text("".join(f"line {n + i} of file {n}\n" for i in range(60)))
    return model, text


@pytest.mark.slow
def test_train_export_and_resume(tmp_path):
    model, text = small(tmp_path)
    options = [
        "--model", model, "--dataset", text, "--block_size", 32, "--max_steps", 16, "--update_interval", 4,
        "--save_steps", 8, "--eval_strategy", "no", "--per_device_train_batch_size", 4, "--logging_steps", 4,
        "--output_dir", tmp_path / "run", "--warmup_steps", 2, "--validation_fraction", 0.2, "--max_eval_tokens", 1024,
    ]  # fmt: skip
    result = run(LAUNCH, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "sparsity 90.0000%" in result.stdout
    # whatever is here, in the first line
    place = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "the CPU"
    assert place in result.stdout.splitlines()[0]
    assert "float32" in result.stdout.splitlines()[0]
    lines = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]  # the paths of this test
    assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert [line.split()[0] for line in lines if " sparse  −" in line] == ["4", "8"]
    export = tmp_path / "run/export"
    loaded = AutoModelForCausalLM.from_pretrained(export)
    assert len(AutoTokenizer.from_pretrained(export)) == 512
    for name, mask in load_masks(export).masks.items():
        weight = loaded.get_parameter(f"{name}.weight")
        assert int(mask.sum()) == round(0.1 * mask.numel())
        assert weight[~mask].eq(0).all()
    assert (tmp_path / "run/training.png").stat().st_size > 10_000
    assert "<h1" in (tmp_path / "run/report.html").read_text()
    first = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert 0 < first["eval_bits_per_byte"] < 9

    started(*options, "--resume_from_checkpoint", tmp_path / "run/checkpoint-8")
    again = json.loads((tmp_path / "run/eval_results.json").read_text())
    assert again["eval_bits_per_byte"] == first["eval_bits_per_byte"]


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    return small(tmp_path_factory.mktemp("small"))


def two_steps(model, text, output):
    return [
        "--model", model, "--dataset", text, "--block_size", 32, "--method", "static", "--max_steps", 2,
        "--save_strategy", "no", "--eval_strategy", "no", "--per_device_train_batch_size", 4,
        "--max_eval_tokens", 256, "--validation_fraction", 0.2, "--output_dir", output,
        "--warmup_steps", 1, "--use_cpu", "true",
    ]  # fmt: skip


@pytest.fixture
def main(smallest, tmp_path, capsys):
    """Train for two steps in this process; returns the exit status or message, and what was printed."""

    def run_script(*options):
        try:
            started(*two_steps(*smallest, tmp_path / "run"), *options)
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return run_script


def broken(*arguments, **options):
    raise RuntimeError("broken on the way")


def no_matplotlib(patch):
    patch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith(("hf_chts.report", "matplotlib."))]:
        patch.delitem(sys.modules, name)


def no_card(patch):
    make = directory.model_card
    patch.setattr(
        directory, "model_card", lambda facts, **parts: broken() if parts["training"] else make(facts, **parts)
    )


# what comes after training: how it is broken, whether the run then counts as failed, and what else it lacks
LABELS = {
    "the figure and the report": (no_matplotlib, 0, ("training.png", "report.html")),
    "the card": (no_card, 0, ()),
    "the file of the metrics": (
        lambda patch: patch.setattr(SparseTrainer, "save_metrics", broken), 0, ("eval_results.json",)
    ),
    "the file of the log": (
        lambda patch: patch.setattr(SparseTrainer, "save_state", broken), 0, ("trainer_state.json",)
    ),
    "the evaluation": (lambda patch: patch.setattr(SparseTrainer, "evaluate", broken), 1, ()),
}  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_nothing_that_comes_after_training_loses_the_model(main, tmp_path, monkeypatch, label):
    breaks, expected, lacking = LABELS[label]
    breaks(monkeypatch)
    code, printed = main()
    assert code == expected
    export = tmp_path / "run/export"
    model = AutoModelForCausalLM.from_pretrained(export)
    for name, mask in load_masks(export).masks.items():
        assert int(mask.sum()) == round(0.1 * mask.numel())
        assert model.get_parameter(f"{name}.weight")[~mask].eq(0).all()
    assert "README.md" in {path.name for path in export.iterdir()}
    assert str(export) in printed.out
    assert "matplotlib" in printed.err if label == "the figure and the report" else "broken on the way" in printed.err
    files = {"training.png", "report.html", "eval_results.json", "trainer_state.json"}
    assert {name for name in files if not (tmp_path / "run" / name).exists()} >= set(lacking)
    if label != "the evaluation":
        assert "bits per byte" in printed.out


@pytest.mark.parametrize("option", ["--prediction_loss_only", "--include_num_input_tokens_seen"])
def test_whatever_is_measured_is_told(main, tmp_path, option):
    code, printed = main(option, "true")
    assert code == 0
    loss = json.loads((tmp_path / "run/eval_results.json").read_text())["eval_loss"]
    assert f"\nloss {loss:.4f}" in printed.out
    assert ("bits per byte" in printed.out) == ("tokens" in option)
    assert (tmp_path / "run/export/model.safetensors").exists()


def test_a_dense_baseline_is_trained_in_place_of_the_sparse_run(main, smallest, tmp_path):
    code, printed = main("--baseline", "same_links", "--sparsity", 0.7)
    assert code == 0, printed.err
    sizes = json.loads(smallest[0].read_text())
    width, ffn = sizes["hidden_size"], sizes["intermediate_size"]
    # of each of two blocks: q, k, v and o are square, gate, up and down have one side of the feed-forward width
    links = 2 * (4 * round(0.3 * width * width) + 3 * round(0.3 * width * ffn))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export")
    weights = [p for name, p in model.named_parameters() if "proj" in name]
    assert sum(p.numel() for p in weights) == pytest.approx(links, rel=0.03)
    assert all(p.ne(0).all() for p in weights)
    assert len(weights) == 14
    assert model.config.hf_chts_baseline["kind"] == "same_links"
    assert "same_links" in printed.out
    assert "same_links" in (tmp_path / "run/export/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--dataset", "nowhere/at/all.txt"), "nowhere/at/all.txt"),
        (("--sparsity", "1.5"), "sparsity is 1.5"),
        (("--method", "set", "--update_interval", 500), "update_interval is 500 steps"),
        (("--model", "missing.json"), "model 'missing.json': there is no such config file"),
        # these would fail after training
        (("--output_dir", "{file}/run"), "{file}/run"),
        (("--export_dir", "{file}"), "{file}"),
        (("--export_dir", "/proc/nowhere"), "/proc/nowhere"),
        (("--batch_eval_metrics", "true"), "batch_eval_metrics"),
        (
            ("--model", "{gpt2}", "--block_size", 65),
            "block_size is 65, and the model has 64 positions",
        ),
        (("--model", "{bert}"), "is an encoder (BertLMHeadModel with is_decoder: false in its config)"),
    ],
)
def test_what_is_refused_before_training(main, tmp_path, monkeypatch, options, named):
    file = tmp_path / "file"
    file.write_text("")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    for kind in ("gpt2", "bert"):
        AutoConfig.for_model(kind, vocab_size=512, max_position_embeddings=64, **sizes).save_pretrained(tmp_path / kind)
    monkeypatch.setattr(SparseTrainer, "train", broken)
    places = {"file": file, "gpt2": tmp_path / "gpt2", "bert": tmp_path / "bert"}
    code, _ = main(*(str(option).format(**places) for option in options))
    assert code.startswith("train_llama.py: ")
    assert named.format(file=file) in code
    assert "\n" not in code


@pytest.mark.parametrize(
    ("environment", "threads"),
    [({"OMP_NUM_THREADS": "1"}, 1), ({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, 3), ({}, 3)],
)
def test_cores_are_taken_where_the_launcher_left_them(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    taken = [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[-1])
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    use_all_cores(SimpleNamespace(device=torch.device("cpu")))
    assert taken[-1] == threads


SIX_STEPS = ("--method", "set", "--update_interval", 2, "--update_warmup_steps", 1, "--max_steps", 6)
SAVED = (*SIX_STEPS, "--save_strategy", "steps", "--save_steps", 3)


def test_a_score_of_ones_own_from_the_command_line(smallest, tmp_path, monkeypatch, request):
    def forget():
        REGROWTH.pop("strength", None)
        sys.modules.pop("my_score", None)

    request.addfinalizer(forget)
    options = [
        *two_steps(*smallest, tmp_path / "run"), *SAVED,
        "--regrowth", "strength", "--regrowth_choice", "hard", "--drop_schedule", "constant",
    ]  # fmt: skip
    own, export = ["--parts", ROOT / "examples/my_score.py"], tmp_path / "run/export"
    with pytest.raises(SystemExit, match="^train_llama.py: unknown regrowth 'strength'"):
        started(*options)
    started(*options, *own)
    masks = load_masks(export).masks
    started(*options, *own, "--resume_from_checkpoint", tmp_path / "run/checkpoint-3")
    assert all(mask.equal(masks[name]) for name, mask in load_masks(export).masks.items())
    # an export names the module; whoever loads it decides whether to import it
    forget()
    with pytest.raises(ValueError, match="regrowth 'strength' is not registered: import my_score first"):
        load_sparse(export)
    monkeypatch.setenv("HF_CHTS_PARTS", str(ROOT / "examples/my_score.py"))
    load_sparse(export)


@pytest.fixture(scope="module")
def saved(smallest, tmp_path_factory):
    """The directory of a run that was saved after its third and its last step."""
    place = tmp_path_factory.mktemp("saved") / "run"
    started(*two_steps(*smallest, place), *SAVED)
    return place


@pytest.fixture
def finished(saved, tmp_path):
    """A copy of it, where `main` trains."""
    return shutil.copytree(saved, tmp_path / "run")


def flip(path):
    """One bit of a file."""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


# what is done to checkpoint-3, what is asked for, and what the refusal names
REFUSED = {
    "no such checkpoint": (
        lambda place: None,
        ("--resume_from_checkpoint", "{run}/checkpoint-4"),
        "{run}/checkpoint-4",
    ),
    "a flipped bit": (
        lambda place: flip(place / "optimizer.pt"),
        ("--resume_from_checkpoint", "{run}/checkpoint-3"),
        "{run}/checkpoint-3/optimizer.pt is damaged",
    ),
    "another config": (
        lambda place: None,
        ("--resume_from_checkpoint", "{run}/checkpoint-3", "--sparsity", "0.8"),
        "sparsity: 0.9 there, 0.8 here",
    ),
    "a dense run": (
        lambda place: None,
        ("--resume_from_checkpoint", "{run}/checkpoint-3", "--method", "dense"),
        "{run}/checkpoint-3 is a checkpoint of a sparse model",
    ),
    "none to resume": (
        lambda place: None,
        ("--resume_from_checkpoint", "true", "--output_dir", "{run}-elsewhere"),
        "{run}-elsewhere",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_resume_is_one_line(main, finished, reason):
    directory = finished
    change, asked, named = REFUSED[reason]
    change(directory / "checkpoint-3")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    code, printed = main(*SIX_STEPS, *(option.format(run=directory) for option in asked))
    assert isinstance(code, str)  # exit status 1
    assert code.startswith("train_llama.py: ")
    assert named.format(run=directory) in code
    assert "\n" not in code
    assert "Traceback" not in printed.err
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_faults_keep_their_traceback(main, monkeypatch):
    step = SparseTrainer.training_step

    def fails_at(number, error):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == number:
                raise error
            return step(self, *args, **kwargs)

        monkeypatch.setattr(SparseTrainer, "training_step", training_step)

    for number, kind in ((1, ValueError), (0, TypeError), (1, RuntimeError), (1, ImportError)):
        error = kind("a fault")
        fails_at(number, error)
        with pytest.raises(type(error), match="a fault"):
            main()
    # these say what is wrong with the run, and not with the program
    for error in (FloatingPointError("diverged"), OSError(28, "the disk is full")):
        fails_at(1, error)
        code, _ = main()
        assert code == f"train_llama.py: {error}"
    fails_at(0, ImportError("liger-kernel is asked for, and not installed"))
    code, _ = main()
    assert code == "train_llama.py: liger-kernel is asked for, and not installed"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_refused_resume_of_several_ranks(smallest, finished):
    directory = finished
    flip(directory / "checkpoint-3/optimizer.pt")
    config = ROOT / "configs/accelerate/cpu_ddp.yaml"
    result = run(
        [*LAUNCH, "--config_file", str(config), "--main_process_port", "0"],
        *two_steps(*smallest, directory), *SIX_STEPS, "--resume_from_checkpoint", directory / "checkpoint-3",
    )  # fmt: skip
    assert result.returncode == 1
    mine = [line for line in result.stderr.splitlines() if "train_llama.py: " in line and "optimizer.pt" in line]
    assert mine
    assert all(f"{directory}/checkpoint-3/optimizer.pt is damaged" in line for line in mine)
    assert 'train_llama.py", line' not in result.stderr  # no traceback of it; the launcher has one of its own


def test_a_console_without_unicode(main, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="surrogateescape", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    code, _ = main("--method", "set", "--max_steps", 6, "--update_interval", 2, "--update_warmup_steps", 1)
    assert code == 0
    printed = stream.buffer.getvalue().decode("ascii")
    assert printed.startswith("Training on the CPU, ")
    assert "sparse  -" in printed
    assert "?" not in printed


def test_one_gpu_of_several_is_used():
    args = SparseTrainingArguments(output_dir="unused", use_cpu=True)
    args._n_gpu = 4  # what the Trainer would share a batch out over
    use_one_device(args)
    assert args.n_gpu == 1
    assert args.train_batch_size == args.per_device_train_batch_size


def test_a_run_goes_on_with_what_it_is_made_of_and_no_other_begins_in_its_folder(main, finished, tmp_path, smallest):
    seals = {path: path.read_bytes() for path in (tmp_path / "run").rglob("checkpoint_seal.json")}
    assert len(seals) == 2
    code, _ = main(*SAVED, "--seed", 7)
    assert code.startswith("train_llama.py: ")
    assert "has checkpoints of another run" in code
    assert "overwrite_output_dir true" in code
    wider = tmp_path / "wider.json"
    wider.write_text(smallest[0].read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    others = {
        "seed: 0 there, 7 here": ("--seed", 7),
        "block_size: 32 there, 16 here": ("--block_size", 16),
        "model.rms_norm_eps": ("--model", wider),
        "training data": ("--validation_fraction", 0.4),
    }
    for said, options in others.items():
        code, _ = main(*SAVED, "--resume_from_checkpoint", "true", *options)
        assert code.startswith("train_llama.py: "), code
        assert "another run" in code
        assert said in code
    assert seals == {path: path.read_bytes() for path in (tmp_path / "run").rglob("checkpoint_seal.json")}
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    # the same text in another place is the same data
    moved = shutil.copytree(smallest[1], tmp_path / "moved/text")
    code, printed = main(*SAVED, "--resume_from_checkpoint", "true", "--dataset", moved)
    assert code == 0, code
    assert str(tmp_path / "run/checkpoint-6") in printed.out


def test_an_export_on_a_full_disk_names_where_the_model_is(main, finished, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directory, "save_masks", full)
    code, _ = main(*SAVED, "--resume_from_checkpoint", "true")
    assert code.startswith("train_llama.py: ")
    assert f"{tmp_path}/run/export could not be written" in code
    assert "No space left" in code
    assert f"The last whole checkpoint is {tmp_path}/run/checkpoint-6" in code
