"""The tables of a study's page, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from markupsafe import Markup

from hf_chts.markdown import code, inline
from hf_chts.studies.figures import Figure, papers_figure
from hf_chts.studies.page_results import Result, StudyResults, gpu_of
from hf_chts.studies.statistics import difference_to, estimate, paired
from hf_chts.studies.study import Row

LEGEND = (
    "Figures are means over the seeds ± their standard error (of a single seed no error is known, and none is given)."
    " An asterisk marks what is more than two standard errors from 0; with three seeds chance alone does that in 18 "
    "cases of 100. With two it would be 30, so that these get none. Two asterisks: in fewer than 5 of 100, by "
    "Student's t. There are many differences here, and among a hundred that are none chance gives five two asterisks."
    " The error of the difference to the paper joins ours and the one that the paper gives, if it gives one. Seconds "
    "are means over the seeds, of training without evaluation: of the processor, over all threads, and of the wall "
    "clock. Other work on the machine makes equal work take up to twice as long, in processor seconds too, so that "
    "how many times as fast a run is should be read so roughly. Memory is the most that a run's process has held in "
    "training; beside it, how much of that came after packages, data and model were loaded. Both are the median "
    "seed's. Paired differences are of runs with the same seed."
)


def main_table(found: StudyResults, figures: Mapping[str, Figure]) -> str:
    """A row of the study a line, below the name of its group: figures, the paper's, seconds, memory.

    Figures that no run has have no column.
    """
    shown = {name: figure for name, figure in figures.items() if any(name in r["figures"] for r in found.results)}
    published = any(row.paper for row in found.study.rows)
    compared = papers_figure(figures)
    devices = any(map(gpu_of, found.results))
    head = ["", "seeds", *(_head(figure) for figure in shown.values())]
    if published:
        head += [f"paper: {figures[compared].head}", "ours − paper"]
    head += ["processor s", "wall s", "peak MiB", "of it after loading"]
    head += ["peak MiB of the device"] if devices else []
    lines: list[list[str]] = []
    for group, rows in found.groups().items():
        if group:
            lines.append([Markup(f"**{inline(group)}**"), *[""] * (len(head) - 1)])
        for row in rows:
            results = list(found.by_row[row.name].values())
            line = [named(row), f"{len(results)} of {len(row.seeds)}"]
            line += [_figure(found, row.name, name, figure) for name, figure in shown.items()]
            if published:
                line += _paper(found, row, compared, figures[compared])
            line += [_mean_seconds(results, "processor_seconds"), _mean_seconds(results, "seconds")]
            line += _memory(results, devices)
            lines.append(line)
    return markdown_table(head, lines)


def differences(found: StudyResults, figures: Mapping[str, Figure], reference: str) -> str:
    """Every row minus the row `reference`, seed by seed; "" if there is nothing to compare.

    Only figures of which more or less is better are compared; those that describe a run are in the table above.
    """
    theirs = found.by_row[reference].keys()
    shown = {name: figure for name, figure in figures.items() if figure.better and found.values(reference, name)}
    head = ["", "shared seeds", *(_head(figure) for figure in shown.values()), "times as fast"]
    lines: list[list[str]] = []
    for group, rows in found.groups().items():
        others = [row for row in rows if row.name != reference and found.by_row[row.name].keys() & theirs]
        if group and others:
            lines.append([Markup(f"**{inline(group)}**"), *[""] * (len(head) - 1)])
        for row in others:
            shared = sorted(found.by_row[row.name].keys() & theirs)
            line = [named(row), str(len(shared))]
            line += [
                figure.difference(paired(found.values(row.name, name), found.values(reference, name)))
                for name, figure in shown.items()
            ]
            lines.append(
                [
                    *line,
                    _times_as_fast(*([found.by_row[name][seed] for seed in shared] for name in (reference, row.name))),
                ]
            )
    if not lines:
        return ""
    label = next(row.label for row in found.study.rows if row.name == reference)
    fast = "times as fast by processor seconds, of the seeds that both ran on the same kind of device"
    text = f"Minus {inline(label)}, seed by seed; {fast}."
    return f"{text}\n\n{markdown_table(head, lines)}"


def orders(found: StudyResults, figures: Mapping[str, Figure]) -> str:
    """For each group with published figures: its rows from the best on, here and in the paper; "" if there are none."""
    name = papers_figure(figures)
    figure = figures[name]
    sign = -1 if figure.better == "lower" else 1
    lines = []
    for group, rows in found.groups().items():
        published = [row for row in rows if row.paper and found.values(row.name, name)]
        if len(published) < 2:
            continue
        means = {row.name: sign * _mean(found.values(row.name, name).values()) for row in published}
        ours = sorted(published, key=lambda row: -means[row.name])
        papers = sorted(published, key=lambda row: -sign * row.paper[0])
        text = inline(ours[0].label)
        for better, worse in pairwise(ours):
            gap = paired(found.values(better.name, name), found.values(worse.name, name))
            outside = None if gap is None else gap.outside
            text += f" {'?' if outside is None else '>' if outside else '≈'} {inline(worse.label)}"
        before = ", ".join(inline(row.label) for row in papers)
        lines.append(f"- {inline(group)}{': ' if group else ''}{text}; in the paper {before}")
    if not lines:
        return ""
    return (
        f"From the best on, by {inline(figure.title)} (>: the paired difference of the two is more than two standard "
        "errors from 0; ≈: it is not; ?: too few shared seeds to tell):\n\n" + "\n".join(lines)
    )


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose columns but the first are aligned to the right. Cells are escaped unless they are `Markup`."""
    rows = [[cell if isinstance(cell, Markup) else inline(cell) for cell in line] for line in (head, *lines)]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [rows[0], rule, *rows[1:]])


def named(row: Row) -> Markup:
    """A row's label, and its name for the command line where that is another."""
    return Markup(inline(row.label) if row.label == row.name else f"{inline(row.label)} ({code(row.name)})")


def _head(figure: Figure) -> str:
    return f"{figure.head} {'↑' if figure.better == 'higher' else '↓'}" if figure.better else figure.head


def _figure(found: StudyResults, row: str, name: str, figure: Figure) -> str:
    text = figure.estimate(estimate(list(found.values(row, name).values())))
    # what only describes a run may have no value in some, such as the links explored by a dense model
    broken = found.not_finite(row, name) if figure.better else 0
    return f"{text} ({broken} not finite)".strip() if broken else text


def _paper(found: StudyResults, row: Row, name: str, figure: Figure) -> list[str]:
    if not row.paper:
        return ["", ""]
    published = figure.text(row.paper[0]) + (f" ± {figure.text(row.paper[1])}" if len(row.paper) > 1 else "")
    ours = estimate(list(found.values(row.name, name).values()))
    return [published, figure.difference(ours and difference_to(ours, *row.paper[:2]))]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _mean_seconds(results: Sequence[Result], name: str) -> str:
    """Of the runs on a CPU, and of those on each kind of GPU."""
    means = {
        gpu: _mean(one[name] for one in results if gpu_of(one) == gpu) for gpu in sorted(set(map(gpu_of, results)))
    }
    texts = {gpu: f"{mean:,.0f}" if mean >= 100 else f"{mean:.3g}" for gpu, mean in means.items()}
    return "; ".join(f"{text} on {gpu}" if gpu and len(texts) > 1 else text for gpu, text in texts.items())


def _times_as_fast(reference: Sequence[Result], results: Sequence[Result]) -> str:
    """By processor seconds, of the seeds with both runs on a CPU or on the same kind of GPU."""
    pairs = [both for both in zip(reference, results, strict=True) if gpu_of(both[0]) == gpu_of(both[1])]
    theirs, ours = (sum(both[which]["processor_seconds"] for both in pairs) for which in (0, 1))
    return f"{theirs / ours:.2g} ×" if theirs and ours else ""


def _memory(results: Sequence[Result], devices: bool) -> list[str]:
    if not results:
        return [""] * (3 if devices else 2)
    memories = [result["memory_mib"] for result in results]
    middle = sorted(memories, key=lambda memory: memory["peak"])[(len(memories) - 1) // 2]
    cells = [f"{middle['peak']:,.0f}", f"{middle['peak'] - middle['before_training']:,.0f}"]
    on_device = [memory["of_device"] for memory in memories if "of_device" in memory]
    return [*cells, *([f"{max(on_device):,.0f}" if on_device else ""] if devices else [])]
