"""What `benchmarks.sparse` leaves behind: tables, a JSON file, and a plot of time as a share of dense attention's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]
COLORS = {"cuflash": "tab:blue", "torch flex": "tab:red", "torch mask": "tab:orange"}
MARKERS = {"random": "o", "window": "s", "butterfly": "^", "hash": "D", "QK-sparse": "v"}


def tables(rows: list[Row]) -> list[Table]:
    """One for each setting, shape and pass."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row['setting']}: {row['shape']}, {row['pass'].replace('_', ' and ')}"
        groups.setdefault(title, []).append(row)
    return [_table(title, group) for title, group in groups.items()]


def _table(title: str, rows: list[Row]) -> Table:
    refused = "\n".join(f"{row['contender']}, {row['case']}: {row['failure']}" for row in rows if "failure" in row)
    view = Table(title=title, caption=refused or None, caption_justify="left")
    for heading in ("case", "density", "contender", "ms", "10-90 %", "TFLOP/s", "/dense", "bar", "paper's", "lists"):
        view.add_column(heading, justify="left" if heading in ("case", "contender") else "right", no_wrap=True)
    case = None
    for row in rows:
        if "failure" in row:
            continue
        low, median, high = (row["seconds"][key] * 1e3 for key in ("p10", "median", "p90"))
        ours = row["contender"] == "cuflash"
        view.add_row(
            row["case"] if row["case"] != case else "",
            f"{row['density']:.2%}",
            row["contender"],
            f"{median:.4g}",
            f"{low:.4g}-{high:.4g}",
            f"{row['tflops']:.3g}",
            f"{row['of_dense']:.3f}" if "of_dense" in row else "",
            f"{row['bar']:.3f}" if ours and "bar" in row else "",
            f"{1 / row['paper']:.3f}" if row.get("paper") else "",
            f"{row['lists']:.1%}" if "lists" in row else "",
        )
        case = row["case"]
    return view


def write(report: dict[str, Any], folder: Path) -> None:
    """sparse.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sparse.json").write_text(json.dumps(report, indent=2) + "\n")


def plot(rows: list[Row], path: Path) -> None:
    """Time as a share of dense attention's against density, a panel for each setting, shape and pass."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    done = [row for row in rows if "of_dense" in row and row["contender"] in COLORS]
    panels = list(dict.fromkeys((row["setting"], row["shape"], row["pass"]) for row in done))
    columns = min(4, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    size = (4.4 * columns, 3.8 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        own = [row for row in done if (row["setting"], row["shape"], row["pass"]) == panel]
        for name, color in COLORS.items():
            for pattern, marker in MARKERS.items():
                points = [
                    (row["density"], row["of_dense"])
                    for row in own
                    if row["contender"] == name and row["case"].startswith(pattern)
                ]
                if points:
                    axes.loglog(*zip(*points, strict=True), marker, color=color, label=f"{name}, {pattern}")
        bars = sorted({(row["density"], row["bar"]) for row in own})
        axes.loglog(*zip(*bars, strict=True), "--", color="grey", label="1.1 s + 0.03")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{panel[0]}: {panel[1]}\n{panel[2].replace('_', ' and ')}", fontsize=9)
        axes.set(xlabel="density", ylabel="time / dense")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
