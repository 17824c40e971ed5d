"""Build the site: run the pages, write them with their pictures and notebooks, hand them to Sphinx.

    python -m docs.site.build --out build/docs [--jobs 2] [--no-run]

Warnings are errors, and so is an output that is not what its page shows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from pathlib import Path
from time import perf_counter

from docs.site import pages, reference
from docs.site.run import Ran, run

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FETCHED = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"")


def as_started_alone() -> None:
    """Processes that a page starts itself begin as by a script, not as this one was: by spawn."""
    set_start_method(None, force=True)


def ran(path: Path) -> tuple[list[Ran], list[str], float]:
    """A page's blocks, run in a folder of their own."""
    os.environ["MPLBACKEND"] = "Agg"
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    begin, here = perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return *run(path.read_text(), path.name), perf_counter() - begin
        finally:
            os.chdir(here)


def write(source: Path, outcomes: dict[str, list[Ran]]) -> None:
    """What Sphinx reads: the pages, those from elsewhere, the reference, the table of contents."""
    public = reference.members()
    chapters = pages.contents((DOCS / "index.md").read_text())
    tutorials = set(chapters["Tutorials"])
    for folder in ("api", "notebooks", "_pictures"):
        (source / folder).mkdir(parents=True)
    shutil.copytree(DOCS / "images", source / "images")
    shutil.copytree(Path(__file__).parent / "_static", source / "_static")
    for path in sorted(DOCS.glob("*.md")):
        text, blocks = path.read_text(), outcomes.get(path.stem, [])
        for number, (png, _) in enumerate(drawn for block in blocks for drawn in block.figures):
            (source / "_pictures" / f"{path.stem}-{number}.png").write_bytes(png)
        out = pages.illustrated(text, blocks, f"_pictures/{path.stem}-{{}}.png") if blocks else text
        if path.stem in tutorials and blocks:
            (source / "notebooks" / f"{path.stem}.ipynb").write_text(pages.notebook(text, blocks))
            link = f"{{download}}`This page as a notebook <notebooks/{path.stem}.ipynb>`"
            out = re.sub(r"\A(# .*\n)", rf"\1\n{link}\n", out)
        (source / path.name).write_text(pages.linked(out, public))
    for place, name in pages.ELSEWHERE.items():
        if name != "index.md":
            text = (DOCS / place).resolve().read_text()
            (source / name).write_text(pages.linked(text, public).replace("](docs/", "]("))
    for name, text in reference.pages().items():
        (source / "api" / f"{name}.md").write_text(text)
    more = {"Project": [*chapters.pop("Project", []), "changelog", "contributing", "data-licences"]}
    trees = (chapters | {"Reference": ["api/index"]} | more).items()
    with (source / "index.md").open("a") as index:
        index.write("".join(pages.toctree(caption, names) for caption, names in trees if names))


def fetches(out: Path) -> list[str]:
    """Tags by which a page would fetch something from another host."""
    found = []
    for path in sorted(out.rglob("*.html")):
        tags = FETCHED.findall(path.read_text())
        found += [f"{path.relative_to(out)}: {tag}" for tag in tags]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--out", type=Path, default=Path("build/docs"))
    parser.add_argument("--jobs", type=int, default=2, help="pages that are run at once")
    parser.add_argument("--no-run", action="store_true", help="no pictures, no outputs compared")
    arguments = parser.parse_args()
    paths = [] if arguments.no_run else sorted(DOCS.glob("*.md"))
    outcomes: dict[str, list[Ran]] = {}
    wrong: list[str] = []
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), as_started_alone) as pool:
        for path, (blocks, found, seconds) in zip(paths, pool.map(ran, paths), strict=True):
            outcomes[path.stem] = blocks
            wrong += found
            if blocks:
                pictures = sum(len(block.figures) for block in blocks)
                print(f"{path.name}: {len(blocks)} blocks, {pictures} pictures, {seconds:.0f} s")
    if wrong:
        sys.exit("\n".join(wrong))
    out = arguments.out.resolve()
    source = out.with_name(f"{out.name}-source")
    for folder in (out, source):
        shutil.rmtree(folder, ignore_errors=True)
    write(source, outcomes)
    from sphinx.cmd.build import main as sphinx

    settings = ["-c", str(Path(__file__).parent), "-d", str(source / ".doctrees")]
    code = sphinx(["-q", "-W", "--keep-going", "-b", "html", *settings, str(source), str(out)])
    found = fetches(out) if code == 0 else []
    if code or found:
        sys.exit("\n".join(found) or code)
    print(f"open {out}/index.html")


if __name__ == "__main__":
    main()
