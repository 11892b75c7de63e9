"""Which class loads a model, told by the name of its own class in its config.json."""

from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_chts.export.sources import architecture

# those that a reader expects, and last those that also take what others are for
_FIRST = ("CausalLM", "Seq2SeqLM", "MaskedLM", "SequenceClassification")
_LAST = ("MultimodalLM", "PreTraining", "")
_AUTO = "AutoModel"


def class_to_load(name: str | None) -> str:
    """The name of transformers' class to load this class with, as a model card shows it: an Auto class if there is.

    AutoModelForCausalLM for classes that transformers does not have: such are registered with it, or their code is in
    the directory.
    """
    known = next(_auto_classes(name, None), None)
    return known or (str(name) if _of_transformers(name) is not None else "AutoModelForCausalLM")


def preprocessor(name: str | None) -> str:
    """The Auto class of what turns data into inputs of this class, as a model card shows it."""
    reads = getattr(_of_transformers(name), "input_modalities", "text")
    return "AutoTokenizer" if reads in ("text", ("text",)) else "AutoProcessor"


def model_class(config: dict[str, Any], *, trust_remote_code: bool = False) -> Any:
    """What has the `from_pretrained` that gives a model of the class that the contents of a config.json name.

    An Auto class, or the class itself: transformers', or one that has been imported.

    Raises:
        ValueError: they name none, or one that nobody knows.
    """
    name, kind = architecture(config), config.get("model_type")
    remote = config.get("auto_map") if trust_remote_code else None
    places = remote.items() if isinstance(remote, dict) else ()
    autos = [auto for auto, place in places if auto.startswith(_AUTO) and str(place).rpartition(".")[2] == name]
    auto = next(iter([*autos, *_auto_classes(name, kind)]), None)
    found = getattr(transformers, auto, None) if auto else _of_transformers(name) or _imported(name)
    if found is None:
        raise ValueError(
            f"config.json is of a {name} (model_type {kind!r}), a class that transformers does not have: import the "
            "module that defines it first, or pass trust_remote_code=True if its code is in the directory and you "
            "trust it"
        )
    return found


def empty_model(config: dict[str, Any], directory: Any) -> PreTrainedModel:
    """The model of a directory whose config.json has these contents, made on the device of the moment."""
    found = model_class(config)
    if hasattr(found, "from_config"):
        return found.from_config(transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False))
    return found._from_config(found.config_class.from_pretrained(directory))


def _auto_classes(name: str | None, kind: Any) -> Iterator[str]:
    """The Auto classes that load a class of this name, for a model type or any (None); the most telling first."""

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
    """The class of this name that somebody else has made of transformers' models, registered or not; of several, that
    which was made last."""
    found, classes = None, [PreTrainedModel]
    for kind in classes:
        classes += kind.__subclasses__()
        if kind.__name__ == name:
            found = kind
    return found
