"""The tables of docs/performance.md, made of the records that benchmarks/performance.py keeps."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ×"


def percent(share: float) -> str:
    return f"{100 * share:g}%"


def model_name(name: str) -> str:
    model, _, blocks = name.partition("/")
    size = re.sub(r"\d[mb]$", lambda digits: digits[0].upper(), model.removeprefix("llama_"))
    return f"LLaMA-{size}" + (f", {blocks} block{'s' if blocks != '1' else ''}" if blocks else "")


def ways_of(results: Sequence[Result], field: str) -> list[str]:
    known = ["dense", "masked", "links", "sparse", "auto", "sparselab", "csr"]
    return [way for way in known if any(way in result[field] for result in results)]


def over_sparselab(result: Result) -> str:
    both = [result["speedup"].get(way) for way in ("sparse", "sparselab")]
    return times(both[0] / both[1]) if all(both) else ""


def steps(results: Sequence[Result]) -> str:
    ways = ways_of(results, "speedup")
    head = ["model", "tokens", "sparsity", "in", "dense, s", *ways, "sparse over sparselab", "bound", "head's share"]
    rows = [
        [
            model_name(r["model"]), r["batch"].replace("x", "×"), percent(r["sparsity"]), r["dtype"].split()[0],
            f"{r['seconds']['dense']:.3g}",
            *(times(r["speedup"].get(way)) for way in ways), over_sparselab(r), times(r["bound"]),
            percent(round(r["head_share"], 2)) if "head_share" in r else "",
        ]
        for r in results
    ]  # fmt: skip
    return table(head, rows)


def mlps(results: Sequence[Result]) -> str:
    ways = ways_of(results, "speedup")
    head = ["optimizer", "threads", "sparsity", "dense, steps/s", *ways, "sparse over sparselab", "bound"]
    rows = [
        [
            r["optimizer"], r["threads"], percent(r["sparsity"]), r["steps_a_second"]["dense"],
            *(times(r["speedup"].get(way)) for way in ways), over_sparselab(r), times(r["bound"]),
        ]
        for r in results
    ]  # fmt: skip
    return table(head, rows)


def exponents(results: Sequence[Result]) -> str:
    blocks = []
    for r in results:
        names = [name for name in r["exponent"] if name != "rest"]
        head = ["one block of", "weights", *(f"{name}, s" for name in names)]
        rows: list[Sequence[object]] = [
            [
                model_name(model).split(",")[0],
                f"{weights / 1e6:.1f} M",
                *(f"{r['seconds'][name][i]:.3g}" for name in names),
            ]
            for i, (model, weights) in enumerate(zip(r["models"], r["weights"], strict=True))
        ]
        rows.append(["**exponent**", "", *(f"**{r['exponent'][name]:.2f}**" for name in names)])
        blocks.append(table(head, rows))
    return "\n\n".join(blocks)


def memories(results: Sequence[Result]) -> str:
    head = ["model", "storage", "sparsity", "bytes for each weight of sparse layers", "peak resident MiB"]
    rows = [
        [model_name(r["model"]), r["storage"], percent(r["sparsity"]), r["all_bytes_per_weight"], r["peak_mib"]]
        for r in results
    ]
    return table(head, rows)


def updates(results: Sequence[Result]) -> str:
    head = ["model", "method", "sparsity", "update, s", "plain, s", "faster than plain", "of a forward and backward"]
    rows = [
        [
            model_name(r["model"]), r["method"], percent(r["sparsity"]), f"{r['update_seconds']:.3g}",
            f"{r['plain_seconds']:.3g}", times(r["plain_over_update"]), f"{r['ratio']:.2f}",
        ]
        for r in results
        if r["benchmark"] == "topology_update"
    ]  # fmt: skip
    grown = [
        f"{r['method']} {r['exponent']:.2f} ({', '.join(model_name(model) for model in r['models'])})"
        for r in results
        if r["benchmark"] == "topology_update_growth"
    ]
    return table(head, rows) + (f"\n\nExponents over the number of weights: {'; '.join(grown)}." if grown else "")


def decodes(results: Sequence[Result]) -> str:
    head = ["model", "sparsity", "weights", "tokens/s", "bound", "MB read a token", "packed over it"]
    rows = [
        [
            f"{model_name(r['model'])}, {r['layers']} blocks", percent(r["sparsity"]), way.replace("_", " "),
            r[way]["tokens_per_second"], r[way]["bound"], round(r[way]["bytes_read"] / 1e6),
            times(r.get(f"over_{way}")),
        ]
        for r in results
        for way in ("packed", "dense_bf16", "dense_fp32")
    ]  # fmt: skip
    return table(head, rows)


TABLES: dict[str, Callable[[Sequence[Result]], str]] = {
    "step": steps,
    "auto": steps,
    "decode": decodes,
    "mlp": mlps,
    "update": updates,
    "exponents": exponents,
    "memory": memories,
}


def machine_line(results: Sequence[Result]) -> str:
    """What the results that name their machine were measured on."""
    found = list(
        dict.fromkeys(
            f"{r['machine']}, {r['torch_capability']}, PyTorch {r['torch']}"
            + (f", numba for {r['numba_target']}" if r["numba_target"] else "")
            for r in results
            if "machine" in r
        )
    )
    return "; ".join(found) or "not measured yet"


def section(group: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The table of a group, and under it the commands that it was made with."""
    mine = [record for record in records if record["group"] == group]
    results = [record["result"] for record in mine if "result" in record]
    if not results:
        return "*Not measured yet.*"
    broken = {record["command"]: record["exit"] for record in mine if record.get("exit")}
    commands = list(dict.fromkeys(record["command"] for record in mine))
    lines = [c + (f"  # exit status {broken[c]}" if c in broken else "") for c in commands]
    return TABLES[group.split()[0]](results) + "\n\n```console\n" + "\n".join(f"$ {line}" for line in lines) + "\n```"


def page(notes: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The notes with `{{machine}}` and the table of each `{{group}}` filled in."""
    plain = [record["result"] for record in records if "result" in record and "avx2" not in record["group"]]

    def filled(match: re.Match) -> str:
        name = match[1].strip()
        return machine_line(plain) if name == "machine" else section(name, records)

    made = "<!-- made by benchmarks/performance.py from benchmarks/performance_notes.md: edit those -->\n"
    return made + re.sub(r"\{\{([^}]+)\}\}", filled, notes)
