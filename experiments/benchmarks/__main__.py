"""How fast is varmeta, beside whom, and how far from what the machine can do?

    python -m experiments.benchmarks --out results/benchmarks --size full --only a,b,c

a  iMAML meta-gradient, 16 gradient steps + 5 of CG    d  time to a given accuracy of an exact fit
b  second-order MAML, 5 steps                          e  growth of time and peak memory
c  joint mean-field step, analytic KL, Adam            f  fraction of the machine's limit
                                                              g  what compiling costs, and "auto"
                                                              beside eager
h  few-shot episodes on Conv-4: a head on shared
   features (ANIL), and second-order MAML

With --device cuda a, b, c and e run there, peers in torch too.  Every row is a process of its own.
Peers come with the extra `bench`; who is not installed gets a row that says so.  Written after
every row, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.benchmarks import accuracy, episodes, growth, overhead, report
from experiments.benchmarks.pairs import PEERS

CASES = {"a": "imaml", "b": "maml", "c": "joint"}
TASKS = {"imaml": (25, 100, 1_000), "maml": (25, 100, 1_000), "joint": (100, 1_000)}
# Agreement in float64 is judged on few tasks, without timing.
EXACT = {"tasks": 10, "dtype": "float64", "timed": False, "compiled": False}
Run = Callable[[str, dict[str, Any]], Any]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    parser.add_argument("--size", choices=("smoke", "full"), default="full")
    parser.add_argument(
        "--only", default="a,b,c,d,e,f,g,h", help="letters, with commas between them"
    )
    parser.add_argument("--peers", help="only these, with commas between them")
    parser.add_argument("--device", default="cpu", help="where torch computes: cpu, cuda")
    parser.add_argument("--seconds", type=float, default=20.0, help="for which a pair is timed")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that one row may take")
    chosen = parser.parse_args(arguments)
    letters = chosen.only.split(",")
    if not set(letters) <= set("abcdefgh"):
        parser.error(f"--only takes letters from a to h, not {chosen.only!r}")
    if chosen.device != "cpu":
        _check_device(parser, chosen.device, letters)
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "machine.json").write_text(json.dumps(machine(), indent=1))
    full = chosen.size == "full"

    def run(module: str, asked: dict[str, Any]) -> Any:
        where = {} if chosen.device == "cpu" else {"device": chosen.device}
        return in_process(module, asked | where, chosen.limit)

    cases = [CASES[letter] for letter in letters if letter in CASES]
    if cases:
        rows = pairs(run, cases, full, chosen.peers, chosen.seconds)
        collect(rows, report.PAIR_COLUMNS, chosen.out, "pairs", report.plot_pairs)
    if "d" in letters:
        collect(accurate(run, full), report.ACCURACY_COLUMNS, chosen.out, "accuracy")
    if "e" in letters:
        labels = {
            name: ("weights" if name == "width" else name, label)
            for name, (label, _, _) in growth.GRID.items()
        }
        collect(
            grown(run, full),
            report.GROWTH_COLUMNS,
            chosen.out,
            "growth",
            lambda f, out: report.plot_growth(f, out, labels),
        )
    if "f" in letters:
        collect(limited(run, full), report.LIMIT_COLUMNS, chosen.out, "limit")
    if "g" in letters:
        collect(
            first_calls(run, full),
            report.OVERHEAD_COLUMNS,
            chosen.out,
            "overhead",
            report.plot_overhead,
        )
    if "h" in letters:
        rows = of_episodes(run, full, chosen.seconds)
        collect(rows, report.EPISODE_COLUMNS, chosen.out, "episodes")


def _check_device(parser: argparse.ArgumentParser, device: str, letters: list[str]) -> None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        parser.error(f"torch has no device {device!r} here: {str(error).partition(chr(10))[0]}")
    if not set(letters) <= set("abce"):
        parser.error(
            "on another device than the cpu only a, b, c and e are measured: give --only a,b,c,e"
        )


def pairs(
    run: Run, cases: list[str], full: bool, only: str | None, seconds: float
) -> Iterable[dict[str, Any]]:
    for case in cases:
        peers = (
            PEERS[case]
            if only is None
            else [peer for peer in only.split(",") if peer in PEERS[case]]
        )
        for peer in peers:
            exact = run("pairs", {"case": case, "peer": peer, **EXACT})
            for tasks in TASKS[case] if full else (5,):
                # on 5 tasks nothing is worth timing long
                row = run(
                    "pairs",
                    {
                        "case": case,
                        "peer": peer,
                        "tasks": tasks,
                        "seconds": seconds if full else 0.5,
                    },
                )
                yield row | {"gradient_gap_float64": exact.get("gradient_gap")}


def accurate(run: Run, full: bool) -> Iterable[dict[str, Any]]:
    for data in accuracy.sets() if full else ("radon",):
        for method in accuracy.METHODS:
            yield run("accuracy", {"data": data, "method": method})


def grown(run: Run, full: bool) -> Iterable[dict[str, Any]]:
    for axis, (_, values, others) in growth.GRID.items():
        for compiled in (True, False):
            for value in values if full else growth.SMOKE[axis]:
                row = run("growth", {axis: value, **others, "compiled": compiled}) | {"axis": axis}
                yield row
                if row.get("note"):  # larger ones would end alike
                    break


def limited(run: Run, full: bool) -> Iterable[dict[str, Any]]:
    for tasks in (100, 1_000) if full else (5,):
        rows = run("limit", {"tasks": tasks, "seconds": 6.0 if full else 0.5})
        yield from rows if isinstance(rows, list) else [rows]


def first_calls(run: Run, full: bool) -> Iterable[dict[str, Any]]:
    for strategy in overhead.STRATEGIES if full else ("joint",):
        for steps in overhead.STEPS if full else (10,):
            eager = None
            for mode in overhead.MODES:
                row = run(
                    "overhead",
                    {
                        "strategy": strategy,
                        "compile": mode,
                        "steps": steps,
                        "tasks": 100 if full else 5,
                    },
                )
                eager = row.get("first_s") if mode is False else eager
                yield row | (
                    {"over_eager": row["first_s"] / eager} if eager and "first_s" in row else {}
                )


def of_episodes(run: Run, full: bool, seconds: float) -> Iterable[dict[str, Any]]:
    small = {"seconds": 0.5, "channels": 4}
    for case, tasks in episodes.CASES if full else (("anil", 2),):
        asked = {"case": case, "tasks": tasks}
        yield run("episodes", asked | ({"seconds": seconds} if full else small))


def in_process(module: str, asked: dict[str, Any], limit: float) -> Any:
    """What `python -m experiments.benchmarks.<module>` prints last; what goes wrong is a note in
    the row.
    """
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        f"experiments.benchmarks.{module}",
        json.dumps(asked),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return asked | {"note": f"not done within {limit:g} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return asked | {"note": f"fails: {last[:160]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def collect(
    rows: Iterable[dict[str, Any]],
    columns: tuple[str, ...],
    out: Path,
    name: str,
    plot: Callable[[pd.DataFrame, Path], None] | None = None,
) -> None:
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        print(report.markdown(report.table([row], columns).dropna(axis=1, how="all")), flush=True)
        report.write(report.table(found, columns), out, name)
    if plot is not None and found:
        plot(report.table(found, columns), out)


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


if __name__ == "__main__":
    main()
