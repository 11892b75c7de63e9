"""`hf-chts fine-tune`: links that stay or are filled, adapters that are merged, and what the export then is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, set_seed

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.data.embedded import embedded_tokenizer
from hf_chts.evaluation import evaluate_zero_shot

pytest.importorskip("trl")
from hf_chts.commands import fine_tune as command
from hf_chts.commands.fine_tune import fine_tune

MESSAGE = [{"role": "assistant", "content": "b"}]
WORDS = ["alpha", "beta", "gamma", "delta", "omega", "kappa", "sigma", "theta"]
SETTINGS = [
    "--max_steps", "12", "--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--logging_steps", "4",
    "--save_strategy", "no", "--report_to", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return embedded_tokenizer(300)


def exported(storage, tmp_path_factory, tokenizer):
    """An export of a sparse model, as its run kept the links."""
    directory = tmp_path_factory.mktemp(storage)
    model = tiny_llama(vocab_size=300)
    sparsify(model, SparsityConfig(method="chts", sparsity=0.8, storage=storage))
    export_sparse(model, directory, tokenizer=tokenizer)
    return directory


@pytest.fixture(scope="module", params=["masked", "links"])
def either_source(request, tmp_path_factory, tokenizer):
    return exported(request.param, tmp_path_factory, tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    return exported("links", tmp_path_factory, tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files with instructions by the columns that they have."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(f"{a} {b}:", f" {b} {a}") for a in WORDS for b in WORDS]
    rows = {
        "completions": [{"prompt": prompt, "completion": completion, "number": 1} for prompt, completion in pairs],
        "messages": [
            {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}
            for prompt, completion in pairs
        ],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(source, data, output, *options):
    """The printed losses by when they were measured."""
    found, said = {}, command._say_loss

    def keep(when, metrics):
        found[when] = metrics["eval_loss"]
        said(when, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_say_loss", keep)
        arguments = ["--model", str(source), "--dataset", str(data), "--output_dir", str(output), *SETTINGS, *options]
        fine_tune(arguments, "fine-tune")
    return found


def masks(directory):
    return load_file(directory / "masks.safetensors")


def test_links_stay(either_source, data, tmp_path, tokenizer):
    trained = []

    class Kept(command.SparseSFTTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trained.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SparseSFTTrainer", Kept)
        losses = run(either_source, data / "completions.jsonl", tmp_path)
    assert losses["after"] < losses["before"] - 1
    before, after = masks(either_source), masks(tmp_path / "export")
    assert before.keys() == after.keys()
    assert all(mask.equal(after[name]) for name, mask in before.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    for name, mask in SparsityHandle.of(load_sparse(tmp_path / "export")).masks().items():
        weight = plain.get_parameter(f"{name}.weight")
        assert not weight[~mask].any()
        assert not weight[mask].equal(
            AutoModelForCausalLM.from_pretrained(either_source).get_parameter(f"{name}.weight")[mask]
        )
    # the harness gives the live model and the exported one the same numbers
    live = evaluate_zero_shot(trained[0].model, "embedded", tokenizer=tokenizer, limit=4, bootstrap_iters=10)
    exported = evaluate_zero_shot(tmp_path / "export", "embedded", limit=4, bootstrap_iters=10)
    assert live["tasks"] == exported["tasks"]


def test_filled(either_source, data, tmp_path):
    """Sparse pretraining, then dense fine-tuning (arXiv 2303.10464)."""
    kept = run(either_source, data / "completions.jsonl", tmp_path / "kept")
    filled = run(either_source, data / "completions.jsonl", tmp_path / "filled", "--zeros", "fill")
    assert filled["before"] == pytest.approx(kept["before"], rel=1e-5)  # all that is new starts at 0
    assert filled["after"] < filled["before"] - 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "filled/export")
    for name, mask in SparsityHandle.of(load_sparse(either_source)).masks().items():
        weight = plain.get_parameter(f"{name}.weight")
        assert weight[~mask].ne(0).float().mean() > 0.99
    assert json.loads((tmp_path / "filled/export/sparsity_config.json").read_text())["method"] == "dense"


def test_messages(source, data, tmp_path, capsys):
    losses = run(source, data / "messages.jsonl", tmp_path)
    assert losses["after"] < losses["before"] - 1
    assert "no chat template: a plain one" in capsys.readouterr().out
    # what the assistant is to say, and its end, are all that counts
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(tmp_path / "export")
    rows = [{"role": "user", "content": "alpha beta:"}, {"role": "assistant", "content": " beta alpha"}]
    found = saved.apply_chat_template(rows, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, kept in zip(found["input_ids"], found["assistant_masks"], strict=True) if kept]
    assert saved.decode(learned) == " beta alpha<|endoftext|>"
    asked = saved.apply_chat_template(rows[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "### user\nalpha beta:\n### assistant\n"
    assert saved.apply_chat_template(rows, tokenize=False).startswith(asked)


def test_adapters_on_the_links_are_merged_without_loss(either_source, data, tmp_path):
    losses = run(either_source, data / "completions.jsonl", tmp_path, "--lora_rank", "4")
    assert losses["after"] < losses["before"] - 0.1
    assert losses["merged"] == pytest.approx(losses["after"], abs=2e-5)
    before, after = masks(either_source), masks(tmp_path / "export")
    assert all(mask.equal(after[name]) for name, mask in before.items())
    old, new = (load_file(folder / "model.safetensors") for folder in (either_source, tmp_path / "export"))
    frozen = [
        name for name in old if name.removesuffix(".weight") not in SparsityHandle.of(load_sparse(either_source)).layers
    ]
    assert all(old[name].equal(new[name]) for name in frozen)  # the base, but for the adapted layers
    assert "0.0% of what they add" in (tmp_path / "export/README.md").read_text()


def test_ordinary_adapters_make_layers_dense(source, data, tmp_path):
    losses = run(source, data / "completions.jsonl", tmp_path, "--lora_rank", "4", "--merge", "dense")
    assert losses["merged"] == pytest.approx(losses["after"], abs=2e-5)
    config = json.loads((tmp_path / "export/sparsity_config.json").read_text())
    assert config["measured_sparsity"] < 0.05


def test_adapters_saved_alone(source, data, tmp_path):
    run(source, data / "completions.jsonl", tmp_path, "--lora_rank", "4", "--merge", "none")
    assert (tmp_path / "adapters/adapter_model.safetensors").is_file()
    assert not (tmp_path / "export").exists()


def test_a_plain_loop(source, data, tmp_path):
    script = Path(__file__).parents[2] / "examples/fine_tune_loop.py"
    done = subprocess.run(
        [sys.executable, script, source, data / "completions.jsonl", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.5
    before, after = masks(source), masks(tmp_path / "out")
    assert all(mask.equal(after[name]) for name, mask in before.items())
    with torch.no_grad():
        assert torch.isfinite(
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(9)[None]).logits
        ).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--zeros", "some"], "zeros is 'some'; choose keep or fill"),
        (["--zeros", "fill", "--lora_rank", "4"], "zeros is 'fill', and LoRA freezes"),
        (["--zeros", "fill", "--export", "packed"], "nothing to pack"),
        (["--merge", "all"], "merge is 'all'; choose masked or dense or none"),
        (["--lora_rank", "-1"], "lora_rank is -1"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "lora_alpha is 0"),
        (["--merge", "dense"], "merge is 'dense', and there are no adapters"),
        (["--model", "nowhere/x"], "nowhere/x"),
        (["--dataset", "nothing.jsonl"], "nothing.jsonl"),
        (["--dataset_split", "valid"], "valid"),
        (["--model", "/gone/model"], "/gone/model is neither a directory nor a Hub id"),
        (["--chat_template_path", "gone.jinja"], "there is no chat template gone.jinja"),
    ],
)
def test_refused(source, data, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        run(source, data / "completions.jsonl", tmp_path / "out", *options)
    assert not (tmp_path / "out/export").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}] * 4, "has the columns text; instructions are in messages"),
        ([{"prompt": "a", "completion": ""}] * 4, "row 1: completion is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 4, "row 1: no message is the assistant's"),
        ([{"messages": "a"}] * 4, "row 1: messages is to be a list"),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}] * 4, "row 1: prompt and completion"),
        ([{"prompt": "a", "completion": "b"}], "has 1 rows"),
        ([], "is empty"),
        ([{"messages": [{"role": "assistant", "content": ""}]}] * 4, "row 1: all messages of the assistant are empty"),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": None}]}]
            * 4,
            "row 1: the messages of prompt and completion are to be",
        ),
        ([{"prompt": ["a"], "completion": ["b"]}] * 4, "row 1: the messages of prompt and completion are to be"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": MESSAGE, "completion": MESSAGE}] * 2,
            "row 2: prompt is text in some rows and a list in others",
        ),
        ([{"messages": [{**MESSAGE[0], "tool_calls": [{"name": "f"}]}]}] * 4, "conversation 1 has tool_calls"),
        ([{"prompt": "a b " * 90, "completion": "b"}] * 4, "in none of the 3 conversations to train on does an answer"),
    ],
)
def test_data_that_cannot_be_learned_from(source, tmp_path, rows, message):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match=message):
        run(source, path, tmp_path / "out")


def test_conversations_that_are_too_long_are_counted(source, data, tmp_path, capsys):
    lines = (data / "completions.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "a b " * 90, "completion": "b", "number": 1})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, *[long] * 40]))
    run(source, path, tmp_path / "out", "--max_steps", "1", "--validation_fraction", "0.5")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out are")]
    assert len(said) == 2
    assert sum(int(line.split()[3]) for line in said) == 40


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocabulary": 400}, "has 400 tokens, and the model embeds 300"),
        ({"eos": False}, "no EOS token to end an answer with: name one of its tokens with --eos_token"),
    ],
)
def test_tokenizers_that_do_not_fit(source, data, tmp_path, changed, message):
    copied = tmp_path / "model"
    shutil.copytree(source, copied)
    embedded_tokenizer(changed.get("vocabulary", 300)).save_pretrained(copied)
    config = copied / "tokenizer_config.json"
    values = json.loads(config.read_text())
    end = values["eos_token"]
    if not changed.get("eos", True):
        values = {name: value for name, value in values.items() if name not in ("eos_token", "pad_token", "bos_token")}
        config.write_text(json.dumps(values))
    for name in ("completions", "messages"):
        with pytest.raises(SystemExit, match=message):
            run(copied, data / f"{name}.jsonl", tmp_path / "out")
    if not changed.get("eos", True):
        run(copied, data / "messages.jsonl", tmp_path / "out", "--max_steps", "1", "--eos_token", end)


def test_a_model_is_not_overwritten_by_its_own_export(source, data, tmp_path):
    with pytest.raises(SystemExit, match="the export would overwrite the model itself"):
        run(source, data / "completions.jsonl", tmp_path / "out", "--export_dir", str(source))


def test_what_cannot_be_exported_is_not_trained(data, tmp_path, tokenizer):
    model = tiny_llama(vocab_size=300)
    sparsify(model, SparsityConfig(method="chts", sparsity=0.8, activation_topk=0.5))
    export_sparse(model, tmp_path / "model", tokenizer=tokenizer, packed=True)
    with pytest.raises(SystemExit, match=r"activation_topk is 0.5: .* --export packed"):
        run(tmp_path / "model", data / "completions.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for options in (["--lora_rank", "2"], ["--zeros", "fill"]):  # they would compute something else in the end
        with pytest.raises(SystemExit, match=r"only the largest activations stay \(activation_topk 0.5\)"):
            run(tmp_path / "model", data / "completions.jsonl", tmp_path / "out", *options)
    run(tmp_path / "model", data / "completions.jsonl", tmp_path / "out", "--max_steps", "1", "--export", "packed")


def test_zeros_that_are_not_kept_are_said(data, tmp_path, tokenizer, capsys):
    model = tiny_llama(vocab_size=300)
    sparsify(model, SparsityConfig(method="topk", sparsity=0.8, also_sparse=["norms"]))
    export_sparse(model, tmp_path / "model", tokenizer=tokenizer)
    run(tmp_path / "model", data / "completions.jsonl", tmp_path / "out", "--max_steps", "1")
    assert "sparse, and its links stay, but not the zeros of its norms (also_sparse)" in capsys.readouterr().out


def test_adapters_on_transposed_weights(data, tmp_path, tokenizer):
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=300, n_positions=64))
    sparsify(model, SparsityConfig(method="chts", sparsity=0.8))
    export_sparse(model, tmp_path / "model", tokenizer=tokenizer)
    losses = run(tmp_path / "model", data / "completions.jsonl", tmp_path / "out", "--lora_rank", "2")
    assert losses["merged"] == pytest.approx(losses["after"], abs=2e-5)


def test_resumed_with_the_same_settings_alone(source, data, tmp_path):
    adapters = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--lora_rank", "2"]
    run(source, data / "completions.jsonl", tmp_path, *adapters)
    whole = load_file(tmp_path / "export/model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "export")
    again = [*adapters, "--resume_from_checkpoint", "true"]
    for options, file, message in (
        (["--lora_rank", "4"], "completions", "LoRA"),
        (["--lora_rank", "0"], "completions", "LoRA"),
        (["--merge", "dense"], "completions", "adapters under the mask: True there, False here"),
        ([], "messages", "training data"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(source, data / f"{file}.jsonl", tmp_path, *again, *options)
    run(source, data / "completions.jsonl", tmp_path, *again)
    resumed = load_file(tmp_path / "export/model.safetensors")
    assert all(weight.equal(resumed[name]) for name, weight in whole.items())
    # another run in the same folder
    with pytest.raises(SystemExit, match="has checkpoints of another run"):
        run(source, data / "completions.jsonl", tmp_path, *adapters)
    run(source, data / "completions.jsonl", tmp_path, *adapters, "--overwrite_output_dir", "true")
