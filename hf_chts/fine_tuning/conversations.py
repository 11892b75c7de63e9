"""Instruction-style data: conversations in `messages`, or `prompt` and `completion`, from files or the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from hf_chts.fine_tuning.questions import embedded_questions

# for tokenizers of pretraining, which have none: no new tokens, and an answer ends as a document does
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
# the columns of each kind of data, in the order in which they are looked for
_KINDS = (("messages",), ("prompt", "completion"))
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_conversations(
    name: str, split: str, validation_split: str | None, validation_fraction: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Conversations to train and to validate on.

    Args:
        name: a .jsonl, .json, .csv or .parquet file, a directory of them or one that `save_to_disk` wrote, a Hub id, or
            "embedded": questions on the Python standard library.
        split: to train on; of a single file "train" is all of it.
        validation_split: None: a share of the rows is held out.
        validation_fraction: that share, in (0, 1).
        seed: chooses these rows.

    Returns:
        (train, validation), with a column `messages`, or `prompt` and `completion`; other columns are gone.

    Raises:
        ValueError: there are no such data or columns, or a row has nothing to learn from; the message names it.
    """
    if name == "embedded":
        return embedded_questions(split), embedded_questions(validation_split or "validation")
    train = _checked(_load(name, split), name)
    if validation_split is not None:
        return train, _checked(_load(name, validation_split), name)
    if len(train) < 2:
        raise ValueError(f"{name} has {len(train)} rows: some are held out to validate on, so it takes at least 2")
    parts = train.train_test_split(test_size=max(1, round(validation_fraction * len(train))), seed=seed)
    return parts["train"], parts["test"]


def check_ends(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset) -> None:
    """Raises ValueError if a tokenizer has no token that ends an answer, or none that fills up a batch."""
    if tokenizer.eos_token is not None:
        return
    if tokenizer.pad_token is None or tokenizer.chat_template is None or not _of_roles(rows):
        raise ValueError(
            "the tokenizer has no EOS token to end an answer with: name one of its tokens with --eos_token"
        )


def give_template(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, say: Callable[[str], None]) -> None:
    """Give a tokenizer without a chat template the plain one, if the rows are conversations.

    Raises:
        ValueError: the rows have calls of tools, which the plain one does not write.
    """
    if tokenizer.chat_template is not None or not _of_roles(rows):
        return
    for number, row in enumerate(rows):
        if any(one.get("tool_calls") for column in row.values() for one in column):
            raise ValueError(
                f"conversation {number + 1} has tool_calls, and the tokenizer has no chat template, without which they "
                "would be left out: name one that writes them with --chat_template_path"
            )
    tokenizer.chat_template = PLAIN_TEMPLATE
    say("The tokenizer has no chat template: a plain one is used and saved with it (### user, ### assistant, EOS)")


def _of_roles(rows: datasets.Dataset) -> bool:
    return isinstance(rows[0].get("messages", rows[0].get("prompt")), list)


def _load(name: str, split: str) -> datasets.Dataset:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            suffix = path.suffix.lower()
            if suffix not in _BUILDERS:
                raise ValueError(f"{name} is none of {', '.join(_BUILDERS)}")
            loaded: Any = datasets.load_dataset(_BUILDERS[suffix], data_files={"train": str(path)}, split=split)
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise ValueError(f"{name} has no split {split!r}, but {', '.join(loaded)}")
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else name, split=split)
    except StopIteration as error:
        raise ValueError(f"{name} is empty: it is to have a row for each conversation") from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"the data {name!r}, split {split!r}, cannot be read: {cause}") from error
    return cast(datasets.Dataset, loaded)


def _checked(rows: datasets.Dataset, name: str) -> datasets.Dataset:
    found = next((kind for kind in _KINDS if set(kind) <= set(rows.column_names)), None)
    if found is None:
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}; instructions are in messages, or in prompt and "
            "completion: rename them"
        )
    if not len(rows):
        raise ValueError(f"{name} has no rows: it is to have one for each conversation")
    rows = rows.select_columns(list(found))
    first = next(iter(rows))
    for number, row in enumerate(rows):
        if problem := _problem(row):
            raise ValueError(f"{name}, row {number + 1}: {problem}")
        if type(row[found[0]]) is not type(first[found[0]]):
            raise ValueError(f"{name}, row {number + 1}: {found[0]} is text in some rows and a list in others")
    return rows


def _problem(row: Any) -> str:
    """Why there is nothing to learn from a row; empty if there is."""
    if "messages" in row:
        if not _are_messages(row["messages"]):
            return "messages is to be a list of {role, content}, both text"
        answers = [one for one in row["messages"] if one["role"] == "assistant"]
        if not answers:
            return "no message is the assistant's"
        return "" if any(map(_says, answers)) else "all messages of the assistant are empty"
    prompt, completion = row["prompt"], row["completion"]
    if type(prompt) is not type(completion) or not isinstance(prompt, (str, list)):
        return "prompt and completion are to be both text, or both lists of messages"
    if isinstance(completion, str):
        return "" if completion else "completion is empty"
    if not (_are_messages(prompt) and _are_messages(completion)):
        return "the messages of prompt and completion are to be {role, content}, both text"
    return "" if any(map(_says, completion)) else "completion is empty"


def _are_messages(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str)
        for one in found
    )


def _says(message: dict[str, Any]) -> bool:
    return bool(message["content"] or message.get("tool_calls"))
