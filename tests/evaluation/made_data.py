"""Small data files with the columns that the tasks' data sets have on the Hub; all sentences are made up here."""

import json

SUBJECTS = ["The cat", "A tall man", "My neighbour", "The old ship", "Nobody", "Every child", "A bird", "Her uncle"]
VERBS = ["sleeps", "sings a song", "sold the boat", "never came back", "likes the rain"]


def sentence(i):
    return f"{SUBJECTS[i % len(SUBJECTS)]} {VERBS[i % len(VERBS)]} in {1900 + i}."


def labels(count, classes):
    """Unbalanced: every third row has another label than 0."""
    return [0 if i % 3 else 1 + (i // 3) % (classes - 1) for i in range(count)]


def row(task, i, label):
    first, second = sentence(i), sentence(i + 3)
    index = {"idx": i}
    match task:
        case "cola" | "sst2":
            return {"sentence": first, "label": label} | index
        case "mnli" | "mnli_mismatch" | "cb" | "sglue_rte":
            return {"premise": first, "hypothesis": second, "label": label} | index
        case "mrpc" | "rte" | "wnli":
            return {"sentence1": first, "sentence2": second, "label": label} | index
        case "qnli":
            return {"question": f"Who {VERBS[i % 5]}?", "sentence": first, "label": label} | index
        case "qqp":
            return {"question1": f"Is it true? {first}", "question2": f"Who says? {second}", "label": label} | index
        case "boolq":
            return {"question": f"does it hold for {i}", "passage": first, "label": label} | index
        case "copa":
            question = ("cause", "effect")[i % 2]
            return {"premise": first, "choice1": second, "choice2": sentence(i + 5), "question": question} | (
                index | {"label": label}
            )
        case "multirc":
            nested = {"idx": {"paragraph": i // 4, "question": i // 2, "answer": i}}
            return {"paragraph": first, "question": f"Who? {i}", "answer": second, "label": label} | nested
        case "record":
            entities = [f"{name} {i}" for name in ("Ada", "Bela", "Cleo")]
            return {
                "passage": f"{first} {', '.join(entities)} were there.\n@highlight\n{second}\n@highlight\nIt ended",
                "query": f"@placeholder went home after {i} days.",
                "entities": entities,
                "entity_spans": {"text": entities, "start": [0, 1, 2], "end": [1, 2, 3]},
                "answers": [entities[label]],
                "idx": {"passage": i, "query": i},
            }
        case "wic":
            return {
                "word": "cat",
                "sentence1": f"The cat {i} sleeps.",
                "sentence2": "A cat o' nine tails.",
                "start1": 4,
                "start2": 2,
                "end1": 7,
                "end2": 5,
                "label": label,
            } | index
        case "wsc":
            text = f"Mark told Pete lies {i} times , which Pete told on . He should have been honest ."
            return {
                "text": text,
                "span1_index": 0,
                "span2_index": text.split().index("He"),
                "span1_text": "Mark",
                "span2_text": "He",
                "label": label,
            } | index
        case "hellaswag":
            return {
                "ind": i,
                "activity_label": "Cooking",
                "ctx_a": first,
                "ctx_b": "then he",
                "ctx": f"{first} then he",
                "endings": [f"[title] {sentence(i + k)}" for k in range(4)],
                "source_id": "made",
                "split": "val",
                "split_type": "indomain",
                "label": str(label),
            }
        case "piqa":
            return {"goal": first, "sol1": second, "sol2": sentence(i + 1), "label": label}
        case "arc_easy" | "arc_challenge":
            names = ["A", "B", "C", "D"] if i % 2 else ["1", "2", "3"]
            choices = {"text": [sentence(i + k) for k in range(len(names))], "label": names}
            return {"id": str(i), "question": first, "choices": choices, "answerKey": names[label]}
        case "openbookqa":
            choices = {"text": [sentence(i + k) for k in range(4)], "label": ["A", "B", "C", "D"]}
            return {"id": str(i), "question_stem": first, "choices": choices, "answerKey": "ABCD"[label]}
        case "winogrande":
            return {
                "sentence": f"The trophy did not fit the case as _ was too big in {i}.",
                "option1": "the trophy",
                "option2": "the case",
                "answer": str(1 + label),
            }
        case "lambada_openai":
            return {"text": f"{first} And then came the king"}
        case "wikitext":
            return {"page": f" = {first} = \n {second} It cost 3 @,@ 000 pounds . \n"}
    raise ValueError(task)


CLASSES = {"mnli": 3, "mnli_mismatch": 3, "cb": 3, "record": 3, "hellaswag": 4, "arc_easy": 3, "arc_challenge": 3}
CLASSES |= {"openbookqa": 4}
SPLITS = {"mnli": "validation_matched", "mnli_mismatch": "validation_mismatched"}
SPLITS |= dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa", "lambada_openai", "wikitext"), "test")


def rows(task, count=10):
    return [row(task, i, label) for i, label in enumerate(labels(count, CLASSES.get(task, 2)))]


def write_rows(path, task_rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in task_rows))
    return path


def write_task(directory, task, count=10):
    return write_rows(directory / task / f"{SPLITS.get(task, 'validation')}.jsonl", rows(task, count))
