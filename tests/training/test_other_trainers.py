"""Trainers of trl, and others with arguments of their own, made sparse by the mixin."""

import math
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace

import pytest
from cases import losses, same_weights
from datasets import Dataset
from safetensors.torch import load_file
from tiny import random_blocks, tiny_llama
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_chts import SparseTrainerMixin, SparsityConfig, SparsityHandle, export_sparse, load_sparse, sparsify
from hf_chts.training.other_trainers import start_reference

trl = pytest.importorskip("trl")
from trl.experimental import cpo, orpo  # noqa: E402

STEPS, INTERVAL, SAVED = 12, 2, 8
SPARSE = SparsityConfig(method="chts", sparsity=0.8, update_interval=INTERVAL, drop_fraction=0.3)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '~' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def sparse_of(kind):
    return type(f"Sparse{kind.__name__}", (SparseTrainerMixin, kind), {})


@cache
def tokenizer():
    """A token for each printable ASCII character; the last one ends a text."""
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<pad>": 95}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="~", pad_token="<pad>", unk_token=" ", chat_template=TEMPLATE
    )


def texts(**columns):
    words = [chr(97 + n % 26) * (3 + n % 5) + chr(98 + n % 7) for n in range(24)]
    return Dataset.from_dict({name: [make(word) for word in words] for name, make in columns.items()})


PREFERENCES = {"prompt": lambda w: w, "chosen": lambda w: w[::-1], "rejected": lambda w: w.upper()}
QUESTIONS = {"prompt": lambda w: w, "completion": lambda w: w[::-1]}
KTO = {**QUESTIONS, "label": lambda w: len(w) % 2 == 0}


def shortness(completions, **columns):
    return [1.0 / (1 + len(text)) for text in completions]


def vowels(completions, **columns):
    return [float(sum(map(text.count, "aeiou"))) for text in completions]


@dataclass
class Case:
    """A trainer, its config and its data; `resumes`: the trainer by itself does, to the same weights."""

    kind: type
    arguments: type
    columns: dict
    settings: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)  # of the trainer
    resumes: bool = True
    rewards: bool = False  # the model has a head for one number


GRPO = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "temperature": 1.0}
CASES = {
    "SFT": Case(trl.SFTTrainer, trl.SFTConfig, {"text": str}),
    "SFT, completions": Case(
        trl.SFTTrainer,
        trl.SFTConfig,
        QUESTIONS,
        {"completion_only_loss": True, "gradient_checkpointing": True},
    ),
    "Reward": Case(trl.RewardTrainer, trl.RewardConfig, PREFERENCES, rewards=True),
    "DPO": Case(trl.DPOTrainer, trl.DPOConfig, PREFERENCES),
    "DPO, precomputed": Case(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, {"precompute_ref_log_probs": True}),
    "DPO, synced": Case(
        trl.DPOTrainer,
        trl.DPOConfig,
        PREFERENCES,
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        resumes=False,  # no checkpoint has the reference
    ),
    "DPO, checkpointed": Case(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, {"gradient_checkpointing": True}),
    "KTO": Case(trl.KTOTrainer, trl.KTOConfig, KTO),
    "GRPO": Case(trl.GRPOTrainer, trl.GRPOConfig, {"prompt": str}, GRPO, {"reward_funcs": [shortness, vowels]}),
    "RLOO": Case(trl.RLOOTrainer, trl.RLOOConfig, {"prompt": str}, GRPO, {"reward_funcs": [shortness, vowels]}),
    "CPO": Case(cpo.CPOTrainer, cpo.CPOConfig, PREFERENCES),
    "ORPO": Case(orpo.ORPOTrainer, orpo.ORPOConfig, PREFERENCES),
}


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "true")  # where it is set, trl tells nobody that it runs


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Directories of a dense causal model and of a dense reward model."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("causal", "reward")}
    tiny_llama().save_pretrained(places["causal"])
    set_seed(0)
    config = LlamaConfig.from_pretrained(places["causal"], num_labels=1, pad_token_id=95)
    LlamaForSequenceClassification(config).save_pretrained(places["reward"])
    for place in places.values():
        tokenizer().save_pretrained(place)
    return places


def build(case, directory, model, sparse=True, **changes):
    settings = {
        "output_dir": str(directory), "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_steps": SAVED, "disable_tqdm": True, "use_cpu": True, "report_to": "none",
        "bf16": False, "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip
    options = {"sparsity": SPARSE} if sparse else {}
    return (sparse_of(case.kind) if sparse else case.kind)(
        model=model,
        args=case.arguments(**(settings | case.settings | changes)),
        train_dataset=texts(**case.columns),
        eval_dataset=texts(**case.columns).select(range(8)),
        processing_class=tokenizer(),
        **options,
        **case.options,
    )


class Invariants(TrainerCallback):
    """After each step, links as many as there should be, and weights and moments of 0 off them."""

    def __init__(self, run):
        self.run, self.changed = run, set()
        self.before = {name: mask.clone() for name, mask in run.sparse.masks().items()}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for layer in self.run.sparse.layers.values():
            assert layer.weight.grad[~layer.mask].eq(0).all()

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        for name, layer in self.run.sparse.layers.items():
            assert int(layer.topology.sum()) == round(0.2 * layer.topology.numel())
            for tensor in (layer.weight, *(optimizer.state[layer.weight][key] for key in ("exp_avg", "exp_avg_sq"))):
                assert tensor[~layer.mask].eq(0).all()
            if not layer.topology.equal(self.before[name]):
                self.changed.add(name)


def model_of(case, dense):
    place = dense["reward" if case.rewards else "causal"]
    kind = LlamaForSequenceClassification if case.rewards else AutoModelForCausalLM
    return kind.from_pretrained(place)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_train_resume_and_export(tmp_path, dense, name):
    case = CASES[name]
    run = build(case, tmp_path / "run", model_of(case, dense), eval_strategy="steps", eval_steps=4)
    assert len(run.sparse.layers) == 14
    invariants = Invariants(run)
    run.add_callback(invariants)
    run.train()
    assert run.state.global_step == STEPS
    assert invariants.changed == run.sparse.layers.keys()
    run.sparse.check()
    trained, masks = state(run.model), {name: mask.clone() for name, mask in run.sparse.masks().items()}

    if case.resumes:
        again = build(case, tmp_path / "run", model_of(case, dense), eval_strategy="steps", eval_steps=4)
        again.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{SAVED}"))
        assert same_weights(state(again.model), trained)
        assert same_weights(again.sparse.masks(), masks)

    export_sparse(run.model, tmp_path / "export")
    written = load_file(tmp_path / "export/model.safetensors")
    assert all(value.equal(trained[key]) for key, value in written.items())
    assert same_weights(state(type(run.model).from_pretrained(tmp_path / "export")), trained)
    assert same_weights(SparsityHandle.of(load_sparse(tmp_path / "export")).masks(), masks)


def test_the_reference_is_the_policy_as_training_starts(tmp_path, dense):
    found = {}
    for name in ("DPO", "DPO, precomputed", "DPO, synced", "DPO, checkpointed"):
        case = CASES[name]
        run = build(case, tmp_path / name, model_of(case, dense), max_steps=4)
        run.train()
        found[name] = losses(run)
        assert found[name][0] == pytest.approx(math.log(2), abs=1e-6)  # a policy does not differ from itself
    assert found["DPO"][-1] < math.log(2) - 1e-3
    for name in ("DPO, precomputed", "DPO, checkpointed"):
        assert found[name] == pytest.approx(found["DPO"], abs=1e-6)
    for name in ("GRPO", "RLOO"):
        case = CASES[name]
        run = build(case, tmp_path / name, model_of(case, dense), max_steps=4)
        run.train()
        assert abs(next(entry["kl"] for entry in run.state.log_history if "kl" in entry)) < 1e-6


def test_a_reference_of_the_users_own_stays_as_it_is(tmp_path, dense):
    reference = model_of(CASES["DPO"], dense)
    before = state(reference)
    case = replace(CASES["DPO"], options={"ref_model": reference})
    run = build(case, tmp_path, model_of(case, dense), max_steps=4)
    run.train()
    assert same_weights(state(reference), before)
    assert abs(losses(run)[0] - math.log(2)) > 1e-4  # it is dense


@pytest.mark.parametrize("how", ["sharded", "computed ahead under FSDP"])
def test_a_reference_in_parts_has_to_come_from_a_sparse_model(tmp_path, dense, how):
    """As engines leave it: only a name of the sparse weights stands for them then."""

    def trainer(model):
        reference = model_of(CASES["DPO"], dense)
        for weight in reference.parameters():
            weight.ds_id = 0
        ahead = how != "sharded"
        args = SimpleNamespace(precompute_ref_log_probs=ahead)
        return SimpleNamespace(
            model=model, ref_model=None if ahead else reference, args=args, is_fsdp_enabled=ahead
        )  # fmt: skip

    handle = sparsify(model_of(CASES["DPO"], dense), SPARSE)
    with pytest.raises(ValueError, match=f"{dense['causal']}.*is not sparse, and shards it: write .* export_sparse"):
        start_reference(trainer(handle.model), handle, given=False)
    start_reference(trainer(handle.model), handle, given=True)
    export_sparse(handle.model, tmp_path / "export")
    loaded = load_sparse(tmp_path / "export")
    start_reference(trainer(loaded), SparsityHandle.of(loaded), given=False)


@pytest.mark.parametrize("name", ["Reward", "DPO", "DPO, precomputed", "GRPO"])
def test_a_model_by_its_path(tmp_path, dense, name):
    case = CASES[name]
    path = str(dense["reward" if case.rewards else "causal"])
    expected = build(case, tmp_path / "object", model_of(case, dense), max_steps=4)
    expected.train()
    run = build(case, tmp_path / "path", path, max_steps=4)
    run.train()
    assert same_weights(state(run.model), state(expected.model))
    assert same_weights(run.sparse.masks(), expected.sparse.masks())


def test_paths_that_cannot_stand_for_a_sparse_model(tmp_path, dense):
    case = CASES["SFT"]
    handle = sparsify(model_of(case, dense), SPARSE)
    with pytest.raises(ValueError, match="sparsity is the handle of a model, but .* is yet to be loaded"):
        sparse_of(trl.SFTTrainer)(model=str(dense["causal"]), sparsity=handle)
    for packed in (False, True):
        place = str(tmp_path / f"export{packed}")
        export_sparse(handle.model, place, tokenizer=tokenizer(), packed=packed)
        with pytest.raises(ValueError, match=r"load_sparse\('.*export"):
            build(case, tmp_path, place)
        # the remedy it names: the reference of trl comes from there too
        run = build(CASES["DPO"], tmp_path / f"run{packed}", load_sparse(place), max_steps=4)
        assert same_weights(run.sparse.masks(), handle.masks())
        run.train()
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("name", ["SFT", "GRPO", "CPO"])
def test_what_a_trainer_gathers_for_its_log_is_in_it(tmp_path, dense, name):
    case = CASES[name]
    run = build(case, tmp_path / "sparse", model_of(case, dense), logging_steps=4, save_strategy="no")
    run.train()
    plain = build(case, tmp_path / "plain", model_of(case, dense), sparse=False, logging_steps=4, save_strategy="no")
    plain.train()
    for trainer in (run, plain):
        trainer.state.log_history.pop()  # the summary of the whole run
    expected = [entry.keys() for entry in plain.state.log_history]
    found = [entry.keys() for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in run.state.log_history if "loss" in entry][-1] == STEPS
    assert all(keys >= expected[0] for keys in found)
    gathered = expected[0] - {"step", "epoch"}
    assert not any(gathered & entry.keys() for entry in run.state.log_history if "loss" not in entry)


def test_adapters_on_a_sparse_model(tmp_path, dense):
    peft = pytest.importorskip("peft")
    case = CASES["SFT"]
    adapters = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])}

    def run():
        set_seed(5)  # of the adapters
        made = build(replace(case, options=adapters), tmp_path, model_of(case, dense))
        assert len(made.sparse.layers) == 14
        return made

    first = run()
    before, masks = state(first.sparse.model), {name: mask.clone() for name, mask in first.sparse.masks().items()}
    first.train()
    after = state(first.sparse.model)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    assert all("lora" in name for name in changed)
    assert same_weights(first.sparse.masks(), masks)
    again = run()
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert same_weights(state(again.sparse.model), after)


class Weighted(Trainer):
    """A trainer with an argument of its own before those it hands on."""

    def __init__(self, weight, *args, **kwargs):
        self.weight = weight
        super().__init__(*args, **kwargs)


class NamesAlone(Trainer):
    def __init__(self, *, weight, model, args, **kwargs):
        self.weight = weight
        super().__init__(model=model, args=args, **kwargs)


def test_arguments_arrive_where_each_class_has_them(tmp_path, dense):
    settings = TrainingArguments(
        str(tmp_path), max_steps=4, save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True
    )
    options = {"sparsity": SPARSE, "train_dataset": random_blocks(8)}
    runs = [
        sparse_of(Weighted)(0.5, tiny_llama(), settings, **options),
        sparse_of(Weighted)(0.5, args=settings, model_init=lambda: tiny_llama(), **options),
        sparse_of(NamesAlone)(weight=0.5, model=tiny_llama(), args=settings, **options),
    ]
    for run in runs:
        assert (run.weight, run.args, len(run.sparse.layers)) == (0.5, settings, 14)
        run.train()
    dpo = trl.DPOConfig(str(tmp_path), max_steps=4, use_cpu=True, report_to="none", bf16=False)
    reference = model_of(CASES["DPO"], dense)
    run = sparse_of(trl.DPOTrainer)(
        model_of(CASES["DPO"], dense), reference, dpo,
        sparsity=SPARSE, train_dataset=texts(**PREFERENCES), processing_class=tokenizer(),
    )  # fmt: skip
    assert run.ref_model is reference
    assert run.args is dpo
    # what does not fit is refused before the model is touched, wherever model and args stand
    late = SparsityConfig(method="set", update_interval=100)
    for kind, given in ((Weighted, (0.5,)), (trl.DPOTrainer, ())):
        model = model_of(CASES["DPO"], dense)
        arguments = (settings,) if kind is Weighted else (None, dpo)
        with pytest.raises(ValueError, match="update_interval is 100"):
            sparse_of(kind)(*given, model, *arguments, sparsity=late)
        assert SparsityHandle.of(model) is None
