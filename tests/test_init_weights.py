"""`--init weights`: runs that start with the weights of a model, as a user starts them, on models of seconds."""

import json
import shutil
from dataclasses import replace

import pytest
from launching import accelerate
from quick import draw_nothing
from test_train_llama import one_thread, small, started, two_steps  # noqa: F401 - a fixture among them
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_chts import SparseTrainer, SparsityConfig, export_sparse, sparsify
from hf_chts.checkpoint import load_masks
from hf_chts.export import pack_directory

EVOLVES = ("--method", "set", "--max_steps", 6, "--update_interval", 2, "--update_warmup_steps", 1)
SAVED = ("--save_strategy", "steps", "--save_steps", 3)
AT_80 = ("--sparsity", 0.8)


@pytest.fixture(autouse=True, scope="module")
def nothing_drawn():
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a corpus, and exports of a dense and a sparse run on it."""
    place = tmp_path_factory.mktemp("made")
    model, text = small(place)
    started(*two_steps(model, text, place / "dense"), "--method", "dense")
    started(*two_steps(model, text, place / "sparse"), *AT_80)
    pack_directory(place / "sparse/export", place / "packed")
    return place


@pytest.fixture
def run(made, tmp_path, capsys):
    """Train from weights in this process; returns 0 or the message, and what was printed."""

    def run_script(model, *options):
        try:
            base = two_steps(model, made / "text", tmp_path / "run")
            started(*base, "--init", "weights", *options)
        except SystemExit as end:
            return end.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run_script


def bits_per_byte(printed):
    """By the word before the colon, or "end"."""
    found = {line.split(":")[0]: line for line in printed.splitlines() if line.startswith(("before", "after "))}
    found["end"] = next(line.split(" on the")[0] for line in printed.splitlines() if line.startswith("loss "))
    return {when: float(line.rsplit(" ", 1)[1]) for when, line in found.items()}


@pytest.mark.parametrize("storage", ["masked", "links"])
@pytest.mark.parametrize("kind", ["sparse/export", "packed"])
def test_a_sparse_export_goes_on_with_its_links(made, run, tmp_path, kind, storage):
    code, printed = run(made / kind, *AT_80, "--storage", storage, "--learning_rate", 0.0)
    assert code == 0, code
    assert "its topology, 80.00% sparse" in printed
    figures = bits_per_byte(printed)
    # nothing was trained: the figures are those of the first run's end, by another way
    first = json.loads((made / "sparse/eval_results.json").read_text())["eval_bits_per_byte"]
    assert figures["before training"] == pytest.approx(first, abs=1e-4)
    assert figures["end"] == pytest.approx(first, abs=1e-4)
    export = tmp_path / "run/export"
    masks = load_masks(made / "sparse/export").masks
    assert all(mask.equal(masks[name]) for name, mask in load_masks(export).masks.items())
    before, after = (AutoModelForCausalLM.from_pretrained(place) for place in (made / "sparse/export", export))
    assert all(value.equal(after.state_dict()[name]) for name, value in before.state_dict().items())


@pytest.mark.parametrize(("topology", "allocation"), [("magnitude", "global"), ("wanda", "erdos_renyi")])
def test_a_dense_model_is_pruned_and_trained_on_and_resumed(made, run, tmp_path, topology, allocation):
    options = (*AT_80, *EVOLVES, *SAVED, "--initial_topology", topology, "--allocation", allocation)
    code, printed = run(made / "dense/export", *options)
    assert code == 0, code
    assert f"pruned to 80.00% by {topology}, {allocation}" in printed
    figures = bits_per_byte(printed)
    first = json.loads((made / "dense/eval_results.json").read_text())["eval_bits_per_byte"]
    assert figures["before pruning"] == pytest.approx(first, abs=1e-4)
    kept = json.loads((tmp_path / "run/start_results.json").read_text())
    assert kept["after pruning"]["bits_per_byte"] == pytest.approx(figures["after pruning"], abs=1e-4)
    export = tmp_path / "run/export"
    assert "before pruning" in (export / "README.md").read_text()
    masks = load_masks(export).masks
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.2 * sum(mask.numel() for mask in masks.values()))
    weights = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert len(AutoTokenizer.from_pretrained(export)) == 512

    resume = ("--resume_from_checkpoint", tmp_path / "run/checkpoint-3")
    code, printed = run(made / "sparse/export", *options, *resume)
    assert "starting weights" in code  # of another model
    code, printed = run(made / "dense/export", *options, *resume)
    assert code == 0, code
    assert "before pruning:" not in printed
    again = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert all(value.equal(again[name]) for name, value in weights.items())
    assert "before pruning" in (export / "README.md").read_text()


def test_links_are_chosen_anew_or_given_up(made, run, tmp_path):
    code, _ = run(made / "packed", "--sparsity", 0.9, "--initial_topology", "magnitude")
    assert code == 0, code
    earlier = load_masks(made / "sparse/export").masks
    for name, mask in load_masks(tmp_path / "run/export").masks.items():
        assert not (mask & ~earlier[name]).any()
    shutil.rmtree(tmp_path / "run")
    code, printed = run(made / "packed", "--method", "dense")
    assert code == 0, code
    assert "all weights trained" in printed


def test_zeros_of_more_than_projections_that_are_not_kept_are_said(made, run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(made / "dense/export")
    sparsify(model, SparsityConfig(method="topk", sparsity=0.8, initial_sparsity=0.8, also_sparse=["norms"]))
    export_sparse(model, tmp_path / "sparse", tokenizer=AutoTokenizer.from_pretrained(made / "dense/export"))
    code, printed = run(tmp_path / "sparse", *AT_80)
    assert code == 0, code
    assert "80.00% sparse; the zeros of its norms (also_sparse) are not kept" in printed


def test_sequences_longer_than_its_positions_are_refused_before_it_is_measured(made, run, tmp_path):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16, "vocab_size": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(made / "dense/export").save_pretrained(tmp_path / "gpt2")
    code, printed = run(tmp_path / "gpt2", "--method", "dense")
    assert "block_size is 32, and the model has 16 positions (transformer.wpe)" in str(code)
    assert "before training" not in printed


@pytest.mark.parametrize("model", ["me/sparse", "me/packed", "me/dense"])
def test_from_the_hub(made, run, hub, waits, tmp_path, monkeypatch, model):
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # of an earlier endpoint
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    folder = {"me/sparse": "sparse/export", "me/packed": "packed", "me/dense": "dense/export"}[model]
    hub.create(model, {path.name: path.read_bytes() for path in (made / folder).iterdir() if path.is_file()})
    code, printed = run(model, *AT_80, *(("--initial_topology", "magnitude") if model == "me/dense" else ()))
    assert code == 0, code
    assert f"Starting with the weights of {model}" in printed


def without_tokenizer(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()


def without_a_weight(directory):
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "0.mlp.up_proj" not in k}, file, metadata={"format": "pt"})
    (directory / "weights_checksums.json").unlink()


def narrowed(directory):
    replace(SparsityConfig.load(directory), activation_topk=0.25).save(directory)


# the model, what is done to a copy of it, the options, and what the refusal says
REFUSED = {
    "another tokenizer": ("dense/export", None, ("--tokenizer", "{other}"), "does not give the token ids that"),
    "a larger tokenizer": ("dense/export", None, ("--tokenizer", "{other}"), "has 513 tokens, more than the model's"),
    "no tokenizer": ("dense/export", without_tokenizer, (), "has no tokenizer: name the one that it was trained with"),
    "new weights": ("dense/export", None, ("--initial_weights", "swi"), "initial_weights is 'swi'"),
    "a missing weight": ("dense/export", without_a_weight, (), "has no weights for model.layers.0.mlp.up_proj.weight"),
    "a config file": ("tiny.json", None, (), "is a config file without any"),
    "another sparsity": ("sparse/export", None, (), "is 80.00% sparse, and this run 90.00%: set sparsity: 0.8"),
    "another allocation": ("sparse/export", None, ("--allocation", "global"), "with allocation 'uniform', and this"),
    "other activations": ("sparse/export", narrowed, AT_80, "activation_topk 0.25), and in this run all"),
    "no sparse activations": (
        "sparse/export",
        narrowed,
        ("--method", "dense"),
        "activation_topk 0.25), and in this run all",
    ),
    "nothing there": ("nowhere", None, (), "nowhere"),
    "a bad choice": ("dense/export", None, ("--init", "copied"), "init is random or weights, got 'copied'"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_before_anything_is_trained(made, run, tmp_path, monkeypatch, reason):
    name, change, options, said = REFUSED[reason]
    model = made / name
    if change is not None:
        model = shutil.copytree(model, tmp_path / "copy")
        change(model)
    if "{other}" in options:
        tokenizer = AutoTokenizer.from_pretrained(made / "dense/export")
        if reason == "a larger tokenizer":
            tokenizer.add_tokens(["another"])
        else:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(400)
        tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(SparseTrainer, "train", lambda *args, **kwargs: pytest.fail("it was trained"))
    code, _ = run(model, *(str(option).format(other=tmp_path / "other") for option in options))
    assert isinstance(code, str)
    assert said in code
    assert "\n" not in code
    assert not (tmp_path / "run/start_results.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["cpu_ddp", "cpu_zero3"])
def test_two_ranks_prune_alike(made, tmp_path, engine):
    pytest.importorskip("deepspeed")
    options = ("--init", "weights", *AT_80, *EVOLVES, "--initial_topology", "wanda")
    base = two_steps(made / "dense/export", made / "text", tmp_path / "one")
    started(*base, *options)
    base = two_steps(made / "dense/export", made / "text", tmp_path / "two")
    accelerate(engine, "train_worker.py", *map(str, (*base, *options, "--per_device_train_batch_size", 2)))
    first, second = (json.loads((tmp_path / name / "start_results.json").read_text()) for name in ("one", "two"))
    for when in ("before pruning", "after pruning"):
        assert second[when] == pytest.approx(first[when], rel=1e-5)
    masks = load_masks(tmp_path / "two/export").masks
    assert all(mask.equal(masks[name]) for name, mask in load_masks(tmp_path / "one/export").masks.items())
