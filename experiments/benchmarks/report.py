"""What was measured, as CSV, plots and Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

PAIR_COLUMNS = (
    "case",
    "tasks",
    "peer",
    "ratio",
    "ratio_low",
    "ratio_high",
    "ours_ms",
    "ours_q1_ms",
    "ours_q3_ms",
    "peer_ms",
    "peer_q1_ms",
    "peer_q3_ms",
    "loss_gap",
    "gradient_gap",
    "standard_errors",
    "gradient_gap_float64",
    "way",
    "ways",
    "note",
)
ACCURACY_COLUMNS = (
    "data",
    "method",
    "tasks",
    "rows",
    "s",
    "fit_s",
    "theta0_gap",
    "sd_gap",
    "sigma_gap",
    "loglik",
    "converged",
    "draws",
    "effective",
    "steps",
    "note",
)
GROWTH_COLUMNS = (
    "axis",
    "tasks",
    "weights",
    "inner_steps",
    "compiled",
    "s",
    "first_s",
    "peak_mb",
    "above_import_mb",
    "data_mb",
    "note",
)
LIMIT_COLUMNS = (
    "case",
    "tasks",
    "fraction",
    "ours_ms",
    "limit_ms",
    "flop_ms",
    "byte_ms",
    "gflop",
    "gb",
    "bmm_gflop_per_s",
    "copy_gb_per_s",
    "note",
)
EPISODE_COLUMNS = (
    "case",
    "tasks",
    "ours_over_peer",
    "ours_ms",
    "ours_q1_ms",
    "ours_q3_ms",
    "peer_ms",
    "peer_q1_ms",
    "peer_q3_ms",
    "loss_gap",
    "gradient_gap",
    "way",
    "note",
)
OVERHEAD_COLUMNS = (
    "strategy",
    "tasks",
    "steps",
    "compile",
    "first_s",
    "second_s",
    "over_eager",
    "overhead_s",
    "step_ms",
    "slowest_step_second_ms",
    "note",
)


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Always the same columns, whatever some row could not say."""
    return pd.DataFrame(rows).reindex(columns=list(columns))


def write(frame: pd.DataFrame, out: Path, name: str) -> None:
    frame.to_csv(out / f"{name}.csv", index=False)
    shown = frame.dropna(axis=1, how="all")
    (out / f"{name}.md").write_text(markdown(shown) + "\n")


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table, numbers to three digits."""
    lines = [" | ".join(map(str, frame.columns)), " | ".join("---" for _ in frame.columns)]
    lines += [" | ".join(_cell(value) for value in row) for row in frame.itertuples(index=False)]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return (
            "" if pd.isna(value) else f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
        )
    return "" if value is None else str(value)


def plot_pairs(frame: pd.DataFrame, out: Path) -> None:
    """How many times slower each peer is, by tasks; one panel a case."""
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(frame["case"]))
    frame = frame.sort_values("tasks", kind="stable")
    figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False)
    for ax, case in zip(axes[0], cases, strict=True):
        known = frame[(frame["case"] == case) & frame["ratio"].notna()]
        for peer, rows in known.groupby("peer", sort=False):
            around = [rows["ratio"] - rows["ratio_low"], rows["ratio_high"] - rows["ratio"]]
            ax.errorbar(
                rows["tasks"], rows["ratio"], yerr=around, marker="o", capsize=3, label=peer
            )
        ax.axhline(1.0, color="grey", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="tasks", title=case)
        if len(known):  # a block in which the machine stood still must not fill the picture
            ax.set_ylim(min(1.0, known["ratio"].min()) / 2, max(1.0, known["ratio"].max()) * 2)
            ticks = known["tasks"].unique()
            ax.set_xticks(ticks, [f"{tasks:,}" for tasks in ticks])
            ax.minorticks_off()
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("time of the peer / time of varmeta")
    _save(figure, out / "pairs.png")


def plot_growth(frame: pd.DataFrame, out: Path, labels: dict[str, tuple[str, str]]) -> None:
    """labels: by axis, the column along it and what it is called."""
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(frame["axis"]))
    figure, axes = plt.subplots(
        2, len(axes_names), figsize=(4.5 * len(axes_names), 7), squeeze=False
    )
    for j, axis in enumerate(axes_names):
        column, label = labels[axis]
        for compiled, rows in frame[frame["axis"] == axis].groupby("compiled", sort=False):
            for i, (what, name) in enumerate(
                (("s", "seconds a step"), ("above_import_mb", "peak memory, MB"))
            ):
                axes[i, j].plot(
                    rows[column], rows[what], marker="o", label="compiled" if compiled else "eager"
                )
                axes[i, j].set(xscale="log", yscale="log", xlabel=label, ylabel=name)
        axes[0, j].legend()
    _save(figure, out / "growth.png")


def plot_overhead(frame: pd.DataFrame, out: Path) -> None:
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(frame["strategy"]))
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False)
    for ax, kind in zip(axes[0], kinds, strict=True):
        for mode, rows in frame[frame["strategy"] == kind].groupby("compile", sort=False):
            ax.plot(rows["steps"], rows["first_s"], marker="o", label=f"compile={mode}")
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="steps of the fit",
            ylabel="seconds, first fit",
            title=kind,
        )
        ax.legend()
    _save(figure, out / "overhead.png")


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
