"""What a run leaves behind: a table on the terminal, a JSON file and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]


def tables(results: list[Result]) -> list[Table]:
    """One table per case, one row per contender: its median, and its rate as a share of the measured rates.

    A contender that could not run says why below.
    """
    return [_table(case, [row for row in results if row["case"] == case]) for case in _unique(results, "case")]


def _table(case: str, rows: list[Result]) -> Table:
    refused = "\n".join(f"{row['contender']}: {row['failure']}" for row in rows if "failure" in row)
    view = Table(title=case, caption=refused or None, caption_justify="left")
    for heading in ("contender", "ms", "10-90 %", "TFLOP/s", "/matmul", "/copy", "error"):
        view.add_column(heading, justify="left" if heading == "contender" else "right", no_wrap=True)
    for row in rows:
        if "failure" in row:
            continue
        low, median, high = (row["seconds"][key] * 1e3 for key in ("p10", "median", "p90"))
        shares = (f"{row['share_of_matmul']:.1%}", f"{row['share_of_copy']:.1%}", f"{row['error']:.1e}")
        view.add_row(row["contender"], f"{median:.4g}", f"{low:.4g}-{high:.4g}", f"{row['tflops']:.3g}", *shares)
    return view


def _unique(results: list[Result], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in results))


def write(report: dict[str, Any], name: str, folder: Path, console: Console) -> None:
    """The JSON and the plot of the pass `name` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(report["results"], name, folder / f"{name}.png")
    console.print(f"wrote {folder / f'{name}.json'} and {folder / f'{name}.png'}")


def plot(results: list[Result], name: str, path: Path) -> None:
    """Bars of TFLOP/s, one group per case, one colour per contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [row for row in results if "failure" not in row]
    cases = _unique(done, "case")
    names = _unique(done, "contender")
    figure, axes = plt.subplots(figsize=(max(6.0, 2.2 * len(cases)), 4.5), layout="constrained")
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        rows = [row for row in done if row["contender"] == name]
        positions = [cases.index(row["case"]) + (i - (len(names) - 1) / 2) * width for row in rows]
        bars = axes.bar(positions, [row["tflops"] for row in rows], width, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(cases)), [case.replace(" ", "\n", 3) for case in cases], fontsize=7)
    axes.set_ylabel("TFLOP/s of visible pairs")
    axes.set_title(f"Attention {name.replace('_', ' + ')} (higher is better)")
    if names:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
