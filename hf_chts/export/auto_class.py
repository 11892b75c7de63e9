"""Which class loads a model, from the name of the model's own class in its config.json."""

from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_chts.export.sources import architecture

# the tasks that a reader expects first, and last those that also accept models of other tasks
_FIRST = ("CausalLM", "Seq2SeqLM", "MaskedLM", "SequenceClassification")
_LAST = ("MultimodalLM", "PreTraining", "")
_AUTO = "AutoModel"


def class_to_load(name: str | None) -> str:
    """The name that a model card shows before `.from_pretrained`: an Auto class if one loads this class, else itself.

    For classes that transformers does not have it is AutoModelForCausalLM: they are registered with it, or their code
    is in the directory.
    """
    known = next(_auto_classes(name, None), None)
    return known or (str(name) if _of_transformers(name) is not None else "AutoModelForCausalLM")


def preprocessor(name: str | None) -> str:
    """The Auto class of the tokenizer or processor for this class, for the model card."""
    reads = getattr(_of_transformers(name), "input_modalities", "text")
    return "AutoTokenizer" if reads in ("text", ("text",)) else "AutoProcessor"


def model_class(config: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The class whose `from_pretrained` loads a model with this config.json: an Auto class, or the class itself.

    Raises:
        ValueError: the class is neither one of transformers nor has been imported.
    """
    name, kind = architecture(config), config.get("model_type")
    remote = config.get("auto_map") if trust_remote_code else None
    places = remote.items() if isinstance(remote, dict) else ()
    autos = [auto for auto, place in places if auto.startswith(_AUTO) and str(place).rpartition(".")[2] == name]
    auto = next(iter([*autos, *_auto_classes(name, kind)]), None)
    found = getattr(transformers, auto, None) if auto else _of_transformers(name) or _imported(name)
    if found is None:
        raise ValueError(
            f"config.json names the class {name} (model_type {kind!r}), which transformers does not have: import the "
            "module that defines it first, or pass trust_remote_code=True if its code is in the directory and you "
            "trust it"
        )
    return found


def empty_model(config: dict[str, Any], directory: Any) -> PreTrainedModel:
    """A new model with the config.json of a directory, on the current device."""
    found = model_class(config)
    if hasattr(found, "from_config"):
        return found.from_config(transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False))
    return found._from_config(found.config_class.from_pretrained(directory))


def _auto_classes(name: str | None, kind: Any) -> Iterator[str]:
    """The Auto classes that load a class of this name, for one model type or any (None); the most specific first."""

    def place(auto: str) -> int:
        task = auto.removeprefix(_AUTO).removeprefix("For")
        return _FIRST.index(task) - len(_FIRST) if task in _FIRST else 1 + _LAST.index(task) if task in _LAST else 0

    for auto in sorted((found for found in vars(modeling_auto) if found.startswith(_AUTO)), key=place):
        mapping = getattr(getattr(modeling_auto, auto), "_model_mapping", None)
        for known, classes in getattr(mapping, "_model_mapping", {}).items():
            if kind in (None, known) and name in (classes if isinstance(classes, tuple | list) else [classes]):
                yield auto
                break


def _of_transformers(name: str | None) -> Any:
    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _imported(name: str | None) -> Any:
    """A class of this name that was derived from transformers' models elsewhere; of several the last one."""
    found, classes = None, [PreTrainedModel]
    for kind in classes:
        classes += kind.__subclasses__()
        if kind.__name__ == name:
            found = kind
    return found
