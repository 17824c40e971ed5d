"""Put what the demonstration printed into the README: `python -m experiments.demo | python -m
experiments.readme`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- demo output: begin -->\n).*?(<!-- demo output: end -->)", re.DOTALL)


def main() -> None:
    output = "\n".join(line.rstrip() for line in sys.stdin.read().strip().splitlines())
    text, count = BLOCK.subn(
        lambda found: f"{found[1]}\n```text\n{output}\n```\n\n{found[2]}", README.read_text()
    )
    if count != 1:
        raise SystemExit("the README has no block for the demonstration's output")
    README.write_text(text)


if __name__ == "__main__":
    main()
