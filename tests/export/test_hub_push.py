"""Pushes of exports to a local stub of the Hub: what arrives, what other processes pull, and what failures leave."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hub_stub import READER
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, tiny_llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_chts import SparsityConfig, SparsityHandle, export_sparse, sparsify
from hf_chts.__main__ import main
from hf_chts.export import PushFailed, push_directory, unpack_directory
from hf_chts.export.hub_errors import TRIES

IDS = torch.arange(30).view(2, 15) % VOCABULARY
PLAIN = {"config.json", "generation_config.json", "model.safetensors", "masks.safetensors", "sparsity_config.json"}
PLAIN |= {"weights_checksums.json"}
PLAIN |= {"README.md"}
RESULT = {
    "model": "somewhere/else",
    "tasks": {"piqa": {"acc": 0.625, "acc_stderr": 0.0125}, "wikitext": {"word_perplexity": 12.5}},
    "chance": {"piqa": 0.5},
    "config": {"limit": 40, "num_fewshot": {"piqa": 0}},
}
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d494844520000000100000001080000000"
    "03a7e9b550000000a49444154789c63680000008200817736a2ff0000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def model():
    model = tiny_llama()
    sparsify(model, SparsityConfig())
    return model.eval()


@pytest.fixture(scope="module")
def exports(model, tmp_path_factory):
    """One model as a plain directory, as one of several shards, packed, and dense; not to be changed."""
    directory = tmp_path_factory.mktemp("exports")
    export_sparse(model, directory / "plain", tokenizer=tokenizer(), metrics={"loss": 1.5})
    export_sparse(model, directory / "shards", max_shard_size="60KB")
    export_sparse(model, directory / "packed", packed=True)
    dense = tiny_llama()
    sparsify(dense, SparsityConfig(method="dense"))
    export_sparse(dense, directory / "dense")
    return directory


def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run(script, *arguments, environment):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


PULL = """
import sys
import hf_chts  # before transformers, and nothing else of it: that is all from_pretrained needs
from transformers import AutoModelForCausalLM, AutoTokenizer
dense = AutoModelForCausalLM.from_pretrained("me/packed")

import torch
from hf_chts import SparsityHandle, load_sparse
found = {}
for name in ("me/plain", "me/packed", "me/dense"):
    model = load_sparse(name).eval()
    with torch.no_grad():
        found[name] = model(torch.arange(30).view(2, 15) % 96).logits, SparsityHandle.of(model).masks()
with torch.no_grad():
    found["from_pretrained"] = dense(torch.arange(30).view(2, 15) % 96).logits, {}
assert len(AutoTokenizer.from_pretrained("me/plain")) == 1
torch.save(found, sys.argv[1])
"""
WITHOUT_HF_CHTS = """
import sys, warnings
sys.modules["hf_chts"] = None  # an import would raise
warnings.simplefilter("error")
import torch
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

def logits(name):
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model(torch.arange(30).view(2, 15) % 96).logits

out, plain, packed, older = sys.argv[1:]
local = logits(plain)
print("quiet until here", file=sys.stderr)
warnings.resetwarnings()
torch.save([local, logits("me/plain")], out)
for name in ("me/packed", packed, older):
    for loader in (AutoModel, LlamaForCausalLM, AutoModelForCausalLM):
        try:
            loader.from_pretrained(name)
        except (ValueError, OSError) as error:
            print(error)
"""


@pytest.mark.slow
def test_pulled_by_another_process(hub, waits, exports, model, tmp_path, capsys):
    for name in ("plain", "packed", "dense"):
        main(["push", str(exports / name), f"me/{name}"])
    said = "".join(capsys.readouterr())
    assert f"pushed  {hub.url}/me/plain\ncommit  {hub.url}/me/plain/commit/" in said
    assert "hf_writer" not in said
    run(PULL, tmp_path / "pulled.pt", environment=hub.environment(tmp_path / "other", token=None))
    pulled = torch.load(tmp_path / "pulled.pt")
    with torch.no_grad():
        expected = model(IDS).logits
    masks = SparsityHandle.of(model).masks()
    for name in ("me/plain", "me/packed"):
        logits, found = pulled[name]
        assert logits.equal(expected)
        assert found.keys() == masks.keys()
        assert all(found[layer].equal(mask) for layer, mask in masks.items())
    assert pulled["from_pretrained"][0].equal(expected)
    assert not pulled["me/dense"][1]


@pytest.mark.slow
def test_without_hf_chts_plain_exports_load_quietly_and_packed_ones_say_what_to_install(hub, exports, model, tmp_path):
    for name in ("plain", "packed"):
        hub.create(f"me/{name}", contents(exports / name))
    # to software that does not know transformers_weights, such as transformers 4, no file looks like weights
    older = shutil.copytree(exports / "packed", tmp_path / "older")
    config = json.loads((older / "config.json").read_text())
    del config["transformers_weights"]
    (older / "config.json").write_text(json.dumps(config))
    directories = [exports / "plain", exports / "packed", older]
    environment = hub.environment(tmp_path / "home", token=None)
    done = run(WITHOUT_HF_CHTS, tmp_path / "logits.pt", *directories, environment=environment)
    with torch.no_grad():
        assert all(found.equal(model(IDS).logits) for found in torch.load(tmp_path / "logits.pt"))
    said = done.stderr.partition("quiet until here")[0].lower()
    for word in ("warn", "newly initialized", "unexpected", "missing", "not used"):
        assert word not in said
    assert done.stdout.count("install it (pip install hf_chts) and `import hf_chts`") == 6
    assert done.stdout.count("no file named model.safetensors") == 3


def test_what_arrives(hub, waits, exports):
    before = contents(exports / "plain")
    commit = push_directory(exports / "plain", "model", commit_message="first")  # in the user's own namespace
    assert str(commit).startswith(f"{hub.url}/me/model/commit/")
    files = hub.files("me/model")
    names = PLAIN | {"tokenizer.json", "tokenizer_config.json"}
    assert files.keys() == names | {".gitattributes"}
    assert {name: files[name] for name in names - {"README.md"}} == {n: before[n] for n in names - {"README.md"}}
    assert hub.messages("me/model") == ["first"]
    assert contents(exports / "plain") == before
    assert waits == []
    assert 'from_pretrained("me/model")' in files["README.md"].decode()
    # once more: nothing is sent again
    puts = hub.count("PUT /lfs/")
    push_directory(exports / "plain", "me/model")
    assert hub.count("PUT /lfs/") == puts == 2


def test_another_layout_replaces_the_earlier_one(hub, waits, exports):
    hub.create(
        "me/model", {"notes.txt": b"mine", "model-00001-of-00009.safetensors": b"old", "last-checkpoint/x": b"-"}
    )
    shards = {path.name for path in (exports / "shards").glob("model-*")}
    assert len(shards) > 2
    packed = {path.name for path in (exports / "packed").glob("packed*")}
    for name, weights in (
        ("shards", shards | {"model.safetensors.index.json", "masks.safetensors"}),
        ("packed", packed),
        ("plain", {"model.safetensors", "masks.safetensors"}),
        ("shards", shards | {"model.safetensors.index.json", "masks.safetensors"}),
    ):
        push_directory(exports / name, "me/model", commit_message=name)
        files = hub.files("me/model")
        assert {file for file in files if "safetensors" in file} == weights
        assert files["notes.txt"] == b"mine"
        assert files["last-checkpoint/x"] == b"-"
    assert hub.messages("me/model") == ["shards", "packed", "plain", "shards"]  # one commit each


def test_only_what_belongs_to_an_export_is_sent(hub, waits, exports, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(exports / "plain", directory)
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "notes.pkl", "secret.json"):
        (directory / name).write_bytes(b"x")
    for name in (
        ".env",
        ".model.safetensors.123",
        "model-00001-of-00002.safetensors",
        "modeling.py",
        "figures/.hidden",
    ):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"x")
    (directory / "figures/a.png").write_bytes(PIXEL)
    (directory / "LICENSE").write_text("as is")
    push_directory(directory, "me/model")
    names = hub.files("me/model").keys() - {".gitattributes"}
    assert names == PLAIN | {"tokenizer.json", "tokenizer_config.json", "figures/a.png", "LICENSE"}
    (directory / "config.json").write_text(
        json.dumps(json.loads((directory / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling.X"}})
    )
    push_directory(directory, "me/model")
    assert "modeling.py" in hub.files("me/model")  # now it is the model's own code


@pytest.mark.parametrize(
    ("pattern", "status", "words"),
    [
        ("PUT /lfs/", 500, "fails with 500"),
        ("POST .*/commit/", None, "the connection to .* failed"),
        ("POST .*/preupload/", 502, "fails with 502"),
        ("POST /api/repos/create", 429, r"too many requests \(429\)"),
    ],
)
def test_a_push_that_breaks_off(hub, waits, exports, tmp_path, pattern, status, words):
    directory = tmp_path / "export"
    shutil.copytree(exports / "packed", directory)
    push_directory(exports / "plain", "me/model")
    old, before = dict(hub.files("me/model")), contents(directory)
    hub.fail(pattern, status=status)
    with pytest.raises(PushFailed, match=words) as raised:
        push_directory(directory, "me/model")
    assert f"hf-chts push {directory} me/model" in str(raised.value)
    assert contents(directory) == before
    assert hub.files("me/model") == old
    assert 0 < len(waits) < 2 * TRIES
    assert hub.messages("me/model") == ["Upload sparse model with hf_chts"]
    hub.failures.clear()
    push_directory(directory, "me/model")
    assert {name for name in hub.files("me/model") if "safetensors" in name} == {
        "packed-00001-of-00001.safetensors",
        "packed.safetensors.index.json",
    }


@pytest.mark.parametrize("pattern", ["POST /api/repos/create", "POST .*/commit/"])
def test_too_many_requests_for_a_moment(hub, waits, exports, pattern):
    hub.fail(pattern, status=429, on={1, 2}, Retry_After=7)
    push_directory(exports / "packed", "me/model")
    # the Hub's own client waits a second longer than the server asks for
    assert waits in ([7, 7], [8, 8])
    assert hub.messages("me/model") == ["Upload sparse model with hf_chts"]


def test_a_wait_that_is_too_long_is_not_waited(hub, waits, exports):
    hub.fail("POST /api/repos/create", status=429, Retry_After=3600)
    with pytest.raises(PushFailed, match=r"too many requests \(429\)"):
        push_directory(exports / "packed", "me/model")
    assert waits == []


def test_a_commit_whose_answer_is_lost(hub, waits, exports):
    push_directory(exports / "plain", "me/model", commit_message="first")
    hub.fail("POST .*/commit/", on={1}, done=True)
    push_directory(exports / "packed", "me/model", commit_message="second")
    # the second time there is nothing left to delete
    assert hub.messages("me/model") == ["first", "second", "second"]
    names = {name for name in hub.files("me/model") if "safetensors" in name}
    assert names == {"packed-00001-of-00001.safetensors", "packed.safetensors.index.json"}
    assert waits == [1]


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        ("hf_expired", "me/model", r"refuses the token \(401\).*hf auth login.*HF_TOKEN"),
        (READER, "me/model", r"may not write to me/model \(403\)"),
        (None, "strangers/model", r"may not write to strangers/model \(403\)"),
        (False, "me/model", "there is no token.*hf auth login.*HF_TOKEN"),
        (None, "a b/c", "'a b/c' is not a repository id"),
    ],
)
def test_who_may_not(hub, waits, exports, token, repo_id, words):
    hub.create("me/model", {"notes.txt": b"mine"})
    with pytest.raises(PushFailed, match=words) as raised:
        push_directory(exports / "plain", repo_id, token=token)
    assert "hf_" not in str(raised.value).replace("hf_chts", "")  # no token
    assert hub.files("me/model").keys() == {".gitattributes", "notes.txt"}
    assert hub.count("PUT|commit") == 0
    assert waits == []


def test_an_unreachable_hub(hub, waits, exports, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushFailed, match="the connection to http://127.0.0.1:9 failed"):
        push_directory(exports / "packed", "me/model")
    assert waits == [1, 2, 4, 8]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()  # it is looked at when a session begins
    with pytest.raises(PushFailed, match="HF_HUB_OFFLINE is set"):
        push_directory(exports / "packed", "me/model")
    huggingface_hub.close_session()


def test_private(hub, waits, exports):
    push_directory(exports / "packed", "me/secret", private=True)
    assert hub.repositories["me/secret"].private
    hub.create("me/open")
    with pytest.raises(PushFailed, match="me/open already exists and is public"):
        push_directory(exports / "packed", "me/open", private=True)
    assert hub.messages("me/open") == []
    push_directory(exports / "packed", "me/secret", private=True, commit_message="again")
    assert hub.messages("me/secret")[0] == "Upload sparse model with hf_chts"


def test_a_branch(hub, waits, exports):
    push_directory(exports / "packed", "me/model", revision="v2")
    push_directory(exports / "plain", "me/model", revision="v2")
    assert hub.files("me/model").keys() == {".gitattributes"}
    files = hub.files("me/model", "v2")
    assert files.keys() >= PLAIN
    assert 'from_pretrained("me/model", revision="v2")' in files["README.md"].decode()


def test_damaged_or_other_directories_are_not_pushed(hub, waits, exports, tmp_path):
    def refused(kind, words, change):
        directory = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        shutil.copytree(exports / "plain", directory)
        change(directory)
        with pytest.raises(kind, match=words):
            push_directory(directory, "me/model")

    with pytest.raises(FileNotFoundError, match="there is no directory"):
        push_directory(tmp_path / "nowhere", "me/model")
    with pytest.raises(NotADirectoryError, match="is a file"):
        push_directory(exports / "plain/config.json", "me/model")
    for name in ("config.json", "model.safetensors", "masks.safetensors", "sparsity_config.json"):
        refused(FileNotFoundError, name, lambda directory, name=name: (directory / name).unlink())
    for name in ("model.safetensors", "masks.safetensors"):
        refused(
            ValueError, f"{name} cannot be used",
            lambda directory, name=name: (directory / name).write_bytes((directory / name).read_bytes()[:-9]),
        )  # fmt: skip

    def other_weights(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"].fill_(1)
        (directory / "weights_checksums.json").unlink()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    def diverged(directory):
        tensors = load_file(directory / "model.safetensors")
        tensors["lm_head.weight"][1, 2] = float("inf")
        (directory / "weights_checksums.json").unlink()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    refused(ValueError, "model.layers.1.mlp.up_proj has weights off its mask", other_weights)
    refused(ValueError, "model.safetensors: there is NaN or infinity in lm_head.weight:", diverged)
    refused(
        ValueError, "README.md: the metadata at the head of the model card cannot be read",
        lambda directory: (directory / "README.md").write_text("---\ntags: [a\n---\n# x\n"),
    )  # fmt: skip
    assert hub.requests == []


def test_card_with_results_and_figures(hub, waits, exports, tmp_path):
    results, figure = tmp_path / "results.json", tmp_path / "training.png"
    other = {**RESULT, "model": "other/model", "tasks": {"piqa": {"acc": 0.1}}}
    further = {"data": {"piqa": "/home/me"}, "documents": {"piqa": [1]}}
    mine = {**RESULT, **further, "model": str(exports / "plain")}
    results.write_text(json.dumps([other, mine]))
    figure.write_bytes(PIXEL)
    before = contents(exports / "plain")
    main(["push", str(exports / "plain"), "me/model", "--results", str(results), "--figures", str(figure)])
    assert contents(exports / "plain") == before
    files = hub.files("me/model")
    assert files["figures/training.png"] == PIXEL
    assert json.loads(files["zero_shot.json"]) == [{**RESULT, "model": "plain"}]  # folders are not for everybody
    (tmp_path / "README.md").write_bytes(files["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    found = {(r.dataset_type, r.metric_type): (r.metric_value, r.metric_args) for r in card.data.eval_results}
    assert found == {
        ("local", "loss"): (1.5, None),
        ("piqa", "acc"): (0.625, {"stderr": 0.0125, "num_fewshot": 0}),
        ("wikitext", "word_perplexity"): (12.5, None),
    }
    assert "| piqa | acc | 0.6250 ± 0.0125 | 0.5000 |" in card.text
    assert "| wikitext | word_perplexity | 12.5000 |  |" in card.text
    assert "Only the first 40 documents" in card.text
    assert "![training](figures/training.png)" in card.text
    # a push without them may be of another model
    push_directory(exports / "plain", "me/model")
    assert not {"zero_shot.json", "figures/training.png"} & hub.files("me/model").keys()

    results.write_text(json.dumps([other, other]))
    with pytest.raises(ValueError, match="the results of 2 models .other/model, other/model."):
        push_directory(exports / "plain", "me/model", results=results)
    results.write_text("{}")
    with pytest.raises(ValueError, match="results.json holds no zero-shot results"):
        push_directory(exports / "plain", "me/model", results=results)
    with pytest.raises(FileNotFoundError, match="there is no figure"):
        push_directory(exports / "plain", "me/model", figures=[tmp_path / "b.png"])
    with pytest.raises(ValueError, match="results.json is not a picture"):
        push_directory(exports / "plain", "me/model", figures=[results])


def test_export_sparse_pushes(hub, waits, model, tmp_path):
    (tmp_path / "training.png").write_bytes(PIXEL)
    given = {
        "training": {"dataset": "allenai/c4", "seed": 3},
        "metrics": {"loss": 2.0, "perplexity": float("inf")},
        "metadata": {"license": "apache-2.0", "tags": ["tiny"]},
        "zero_shot": RESULT,
        "figures": [tmp_path / "training.png"],
    }
    for packed in (False, True):
        directory = export_sparse(model, tmp_path / "model", packed=packed, push_to_hub=True, **given)
        files = hub.files("me/model")  # the directory's name, in the user's own namespace
        assert ("masks.safetensors" in files) != packed
        assert files["figures/training.png"] == (directory / "figures/training.png").read_bytes() == PIXEL
        assert json.loads(files["zero_shot.json"]) == [RESULT]
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "apache-2.0"
        assert card.data.datasets == ["allenai/c4"]
        assert set(card.data.tags) == {"hf_chts", "sparse", "dynamic-sparse-training", "chtss", "tiny"}
        assert {(r.dataset_type, r.metric_type) for r in card.data.eval_results} == {
            ("allenai/c4", "loss"), ("piqa", "acc"), ("wikitext", "word_perplexity"),
        }  # fmt: skip
        assert card.text.count("## Zero-shot") == card.text.count("## Figures") == 1
        assert ("import hf_chts  # pip install" in card.text) == packed
        assert (directory / "README.md").read_text().replace("DIRECTORY_OR_HUB_ID", '"me/model"') == str(card)
    unpack_directory(tmp_path / "model", tmp_path / "unpacked")  # figures and results go along
    assert (tmp_path / "unpacked/figures/training.png").read_bytes() == PIXEL
    assert json.loads((tmp_path / "unpacked/zero_shot.json").read_text()) == [RESULT]
    export_sparse(model, tmp_path / "model")  # the results belonged to the earlier model
    assert not (tmp_path / "model/zero_shot.json").exists()
    hub.objects.clear()  # equal files would not be sent again
    hub.fail("PUT /lfs/", status=500)
    with pytest.raises(PushFailed, match="hf-chts push"):
        export_sparse(model, tmp_path / "b", push_to_hub=True, repo_id="me/other")
    assert {path.name for path in (tmp_path / "b").iterdir()} == PLAIN
    hub.failures.clear()
    push_directory(tmp_path / "b", "me/other")
    assert hub.files("me/other").keys() >= PLAIN


def test_a_card_of_the_users_own_stays(hub, waits, exports, tmp_path):
    directory = tmp_path / "export"
    shutil.copytree(exports / "packed", directory)
    (directory / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\n## Notes\n\nby hand\n")
    push_directory(directory, "me/model")
    assert hub.files("me/model")["README.md"] == (directory / "README.md").read_bytes()
    (directory / "zero_shot.json").write_text(json.dumps([RESULT]))
    push_directory(directory, "me/model")
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.model_name == "Mine"
    assert "by hand" in card.text
    (directory / "README.md").unlink()
    push_directory(directory, "me/model")
    card = ModelCard(hub.files("me/model")["README.md"].decode())
    assert "| `q_proj` | 2 | 40 × 40 | 1,600 | 50.00% |" in card.text  # counted in the packed file
    assert "hf-chts unpack DIR OUT" in card.text
