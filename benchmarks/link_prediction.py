"""Node-based against path-based link prediction: time per call, and how far they agree on the missing links.

    python benchmarks/link_prediction.py [--repeats 5] [--networks 3]
        [--figure docs/link_prediction.png] [--table docs/link_prediction.md]

Prints one JSON line per size, density and kind of network. The four scores are timed in turns, on one thread, and
times are medians over repeats and networks. The agreement of CH2-L3n with CH2-L3p and of CH3-L3n with CH3-L3p is the
mean over networks of Spearman's rank correlation, over all missing links and over those that a path of length three
reaches, where the scores are not 0 by definition; and of the share of the highest path-based scores, as many as a
tenth of the links, that are among the highest node-based ones. For comparison, the same for the mere number of paths.
"""

import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from setups import parser
from torch import Tensor

from hf_chts.files.atomic import write_whole
from hf_chts.plotting import COLOURS, encoded, look
from hf_chts.topology.allocation import links_at
from hf_chts.topology.initial import bipartite_receptive_field, erdos_renyi
from hf_chts.topology.link_prediction import ch2_l3n, ch2_l3p, ch3_l3n, ch3_l3p
from hf_chts.topology.random_streams import random_stream
from hf_chts.topology.rank_correlation import spearman

SIZES = ((32, 32), (64, 64), (96, 96), (128, 64), (256, 256))
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)
NETWORKS: dict[str, Callable[..., Tensor]] = {"ER": erdos_renyi, "BRF": bipartite_receptive_field}
SCORES = {"CH2-L3n": ch2_l3n, "CH2-L3p": ch2_l3p, "CH3-L3n": ch3_l3n, "CH3-L3p": ch3_l3p}
PAIRS = {"CH2": ("CH2-L3n", "CH2-L3p"), "CH3": ("CH3-L3n", "CH3-L3p"), "paths": ("paths", "CH2-L3p")}
TOP = 0.1  # of the number of links: as many as an update with drop fraction 0.1 regrows

WEAK = 0.8  # agreement below this is called out


def measure(shape: tuple[int, int], density: float, kind: str, networks: int, repeats: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in SCORES}
    agreement: dict[str, list[float]] = {f"{pair} {how}": [] for pair in PAIRS for how in ("all", "reached", "top")}
    reached_share = []
    for key in range(networks):
        links = links_at(shape[0] * shape[1], 1 - density)
        mask = NETWORKS[kind](*shape, links, generator=random_stream(key, *shape, kind, round(density * 1e6)))
        scores = {name: score(mask) for name, score in SCORES.items()}  # warms up, too
        for repeat in range(repeats):
            names = list(SCORES)
            for name in names[repeat % 4 :] + names[: repeat % 4]:
                start = time.perf_counter()
                SCORES[name](mask)
                seconds[name].append(time.perf_counter() - start)
        missing = ~mask
        paths = mask.double() @ mask.t().double() @ mask.double() * missing
        reached = paths > 0
        reached_share.append(int(reached.sum()) / int(missing.sum()))
        top = min(round(TOP * int(mask.sum())), int(reached.sum()))
        for pair, (approximate, exact) in PAIRS.items():
            x, y = (scores | {"paths": paths})[approximate].double(), scores[exact]
            agreement[f"{pair} all"].append(_rho(x[missing], y[missing]))
            agreement[f"{pair} reached"].append(_rho(x[reached], y[reached]))
            agreement[f"{pair} top"].append(_top_overlap(x[reached], y[reached], top))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "benchmark": "link_prediction",
        "size": list(shape),
        "density": density,
        "network": kind,
        "milliseconds": {name: round(1000 * median, 3) for name, median in medians.items()},
        "path_over_node": {pair: round(medians[p] / medians[n], 1) for pair, (n, p) in PAIRS.items() if n in medians},
        "agreement": {name: _mean(values) for name, values in agreement.items()},
        "reached": round(statistics.mean(reached_share), 3),
        "networks": networks,
        "repeats": repeats,
    }


def _rho(first: Tensor, second: Tensor) -> float:
    return spearman(first, second) if len(first) >= 2 else math.nan


def _top_overlap(first: Tensor, second: Tensor, k: int) -> float:
    """The share of the k highest of `second` that are among the k highest of `first`."""
    if not k:
        return math.nan
    highest = set(first.topk(k).indices.tolist())
    return sum(index in highest for index in second.topk(k).indices.tolist()) / k


def _mean(values: list[float]) -> float | None:
    """None where any is undefined: too few links, or all of one score."""
    mean = statistics.mean(values)
    return None if math.isnan(mean) else round(mean, 3)


@look()
def write_figure(cases: list[dict], path: Path) -> None:
    figure = Figure(figsize=(10, 11), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True)
    for column, kind in enumerate(NETWORKS):
        for color, size in enumerate(SIZES):
            rows = [case for case in cases if case["network"] == kind and tuple(case["size"]) == size]
            x = [row["density"] for row in rows]
            for name, line in (("CH2-L3n", "--"), ("CH2-L3p", "-")):
                y = [row["milliseconds"][name] for row in rows]
                axes[0, column].plot(x, y, line, color=COLOURS[color], marker=".", label=f"{size[0]}×{size[1]} {name}")
            for row, how in ((1, "reached"), (2, "top")):
                for pair, line in (("CH2", "-"), ("CH3", ":")):
                    found = [case["agreement"][f"{pair} {how}"] for case in rows]
                    y = [math.nan if value is None else value for value in found]
                    label = f"{size[0]}×{size[1]} {pair}"
                    axes[row, column].plot(x, y, line, color=COLOURS[color], marker=".", label=label)
        axes[0, column].set_title(f"{kind} networks")
        axes[0, column].set_yscale("log")
        axes[0, column].set_ylim(0.1, 3000)  # with room for the legend
        axes[2, column].set_xscale("log")
        axes[2, column].set_xticks(DENSITIES, [str(density) for density in DENSITIES])
        axes[2, column].xaxis.set_minor_locator(NullLocator())
        axes[2, column].set_xlabel("density")
        axes[1, column].set_ylim(0.5, 1.02)
        axes[2, column].set_ylim(0.5, 1.02)
    axes[0, 0].set_ylabel("milliseconds per call")
    axes[1, 0].set_ylabel("Spearman's ρ over reached links")
    axes[2, 0].set_ylabel("share of the top that both have")
    for row in axes:
        row[1].legend(fontsize=7, ncols=2)
    write_whole(path, encoded(figure, "png", dpi=120))


def write_table(cases: list[dict], path: Path, figure: Path | None, command: str, machine: str, load: float) -> None:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    columns = [f"{pair} {how}" for pair in ("CH2", "CH3") for how in ("all", "reached", "top")]
    columns += ["paths reached", "paths top"]
    named = [name.replace(" all", " ρ all").replace(" reached", " ρ reached") for name in columns]
    header = ["size", "density", "network", "CH2-L3n ms", "CH2-L3p ms", "times slower", "reached", *named]
    lines = [
        "# Node-based and path-based link prediction",
        "",
        "CH2-L3n and CH3-L3n, the scores by which links are regrown, stand in for the path-based CH2-L3p and CH3-L3p,",
        "which add a term for every path of length three between the ends of a missing link. This page measures what",
        "that saves, and how far the two put missing links into the same order.",
        "",
        f"    {command}",
        "",
        f"Machine: {machine}; one thread; load average {load:.1f} at the start,",
        f"from other work where it is above 0. Each row has {cases[0]['networks']} networks and",
        f"{cases[0]['repeats']} timed calls of each score on each, in turns. Times are medians, agreements are",
        "means over the networks.",
        "",
    ]
    if figure:
        lines += [f"![Times and rank correlations over density]({figure.name})", ""]
    lines += [
        "## What the columns mean",
        "",
        "- *reached*: the share of missing links that at least one path of length three leads to. All others have",
        "  score 0 by either definition.",
        "- *ρ all*: Spearman's rank correlation over all missing links. Where few are reached it is high for no better",
        "  reason than that both scores are 0 in the same places.",
        "- *ρ reached*: the same over reached links only: whether the scores agree about links that both could choose.",
        "  A dash: too few such links in one of the networks, or no differences among them.",
        "- *top*: of the links with the highest path-based scores, as many as a tenth of the layer's links, the share",
        "  that is also among as many with the highest node-based scores. Hard regrowth looks at nothing else.",
        "- *paths ρ reached*, *paths top*: the same figures for the mere number of paths of length three against",
        "  CH2-L3p. What CH2-L3n adds is what it has above these.",
        "- *times slower*: median time of the path-based score over that of the node-based one. The path-based scores",
        "  here are matrix products over whole neighbourhoods; code that lists paths will come to other ratios.",
        "",
        "In small, sparse layers the top is a handful of links (2 of 32×32 at density 0.02), and equal scores, above",
        "all equal numbers of paths, fall in or out of it by position.",
        "",
        "## What they say",
        "",
        *_findings(cases),
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join('---' for _ in header)} |",
    ]
    for case in cases:
        cells = [
            f"{case['size'][0]}×{case['size'][1]}",
            str(case["density"]),
            case["network"],
            f"{case['milliseconds']['CH2-L3n']:.2f}",
            f"{case['milliseconds']['CH2-L3p']:.2f}",
            f"{case['path_over_node']['CH2']:.0f}",
            f"{case['reached']:.2f}",
            *(number(case["agreement"][name]) for name in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _findings(cases: list[dict]) -> list[str]:
    """Lines that say what the figures come to, computed from them."""
    by_ratio = sorted(cases, key=lambda case: case["path_over_node"]["CH2"])
    lines = [
        f"- CH2-L3p takes {by_ratio[0]['path_over_node']['CH2']:.0f} ({_where(by_ratio[0])}) to "
        f"{by_ratio[-1]['path_over_node']['CH2']:.0f} times ({_where(by_ratio[-1])}) as long as CH2-L3n."
    ]
    for name, what in (
        ("CH2 reached", "CH2, ρ over reached links"),
        ("CH3 reached", "CH3, ρ over reached links"),
        ("paths reached", "Number of paths against CH2-L3p, ρ over reached links"),
        ("CH2 top", "CH2, top"),
        ("CH3 top", "CH3, top"),
        ("paths top", "Number of paths against CH2-L3p, top"),
    ):
        known = sorted(
            (case for case in cases if case["agreement"][name] is not None), key=lambda c: c["agreement"][name]
        )
        values = [case["agreement"][name] for case in known]
        weak = sum(value < WEAK for value in values)
        lines.append(
            f"- {what}: from {values[0]:.2f} ({_where(known[0])}) to {values[-1]:.2f}, median "
            f"{statistics.median(values):.2f}; below {WEAK} in {weak} of {len(values)} cases."
        )
    worse = [
        case
        for case in cases
        if None not in (case["agreement"]["CH2 top"], case["agreement"]["paths top"])
        and case["agreement"]["CH2 top"] < case["agreement"]["paths top"]
    ]
    kinds = ", ".join(f"{sum(case['network'] == kind for case in worse)} {kind}" for kind in NETWORKS)
    lines.append(
        f"- In {len(worse)} of {len(cases)} cases ({kinds}) the number of paths alone finds more of the top of CH2-L3p "
        "than CH2-L3n does."
    )
    return lines


def _where(case: dict) -> str:
    return f"{case['size'][0]}×{case['size'][1]}, density {case['density']}, {case['network']}"


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5, help="timed calls of each score per network (default: 5)")
    options.add_argument("--networks", type=int, default=3, help="networks per case (default: 3)")
    options.add_argument("--figure", type=Path, help="write a figure here, PNG (default: none)")
    options.add_argument(
        "--table", type=Path, help="write a page with the figures as a table here, Markdown (default: none)"
    )
    options.add_argument("--machine", default="not named", help="what the table calls the machine (default: not named)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    results = []
    for shape in SIZES:
        for density in DENSITIES:
            for kind in NETWORKS:
                results.append(measure(shape, density, kind, arguments.networks, arguments.repeats))
                print(json.dumps(results[-1]), flush=True)
    if arguments.figure:
        write_figure(results, arguments.figure)
    if arguments.table:
        write_table(
            results, arguments.table, arguments.figure, f"python {shlex.join(sys.argv)}", arguments.machine, load
        )
