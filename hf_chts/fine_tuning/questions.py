"""Questions and answers that every machine has: what the Python standard library says of its functions and classes."""

import ast
import warnings
from collections.abc import Iterator

import datasets

from hf_chts.data.embedded import Document, embedded_documents


def embedded_questions(split: str) -> datasets.Dataset:
    """A column `messages`: a question on a public function or class, and the first sentence of its docstring.

    The files of a split are those of the embedded corpus, so that no validation file was trained on.

    Args:
        split: train, validation or test.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: this Python comes without the sources of its standard library.
    """
    rows = [
        [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": answer}]
        for document in embedded_documents(split)
        for name, answer in _documented(document)
    ]
    return datasets.Dataset.from_dict({"messages": rows})


def _documented(document: Document) -> Iterator[tuple[str, str]]:
    """Names such as textwrap.dedent and the sentences on them."""
    parts = document.path.removesuffix(".py").removesuffix("/__init__").split("/")
    if any(part.startswith("_") for part in parts):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the sources themselves, such as on escapes in old strings
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # a few files are there to be wrong
        return
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            said = (ast.get_docstring(node) or "").split("\n\n")[0]
            sentence = " ".join(said.split())
            if len(sentence.split()) >= 3:  # shorter ones are mostly names
                yield ".".join([*parts, node.name]), sentence
