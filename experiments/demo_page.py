"""Put what the demonstration printed into docs/demo.md: `python -m experiments.demo | python -m
experiments.demo_page`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
PAGE = README.parent / "docs" / "demo.md"
BLOCK = re.compile(r"(<!-- demo output: begin -->\n).*?(<!-- demo output: end -->)", re.DOTALL)


def main() -> None:
    output = "\n".join(line.rstrip() for line in sys.stdin.read().strip().splitlines())
    text, count = BLOCK.subn(
        lambda found: f"{found[1]}\n```text\n{output}\n```\n\n{found[2]}", PAGE.read_text()
    )
    if count != 1:
        raise SystemExit(f"{PAGE} has no block for the demonstration's output")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
