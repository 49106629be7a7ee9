"""Try cases of the corpus by the ids of their bugs: ``python tests/corpus/try_cases.py TRL-050 ORL-069``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from corpus.case import bugs, cases  # noqa: E402  # found through the line above when this file is run as a script
from corpus.judge import judge, sound  # noqa: E402


def main(wanted: list[str]) -> int:
    """Print what is said of each case of these bugs, of all where none is named."""
    unknown = [one for one in wanted if one not in bugs()]
    if unknown:
        print(f"no such bug: {', '.join(unknown)}")
        return 2
    missed = 0
    with sound() as given:
        for case in cases():
            if wanted and case.bug not in wanted:
                continue
            started = time.perf_counter()
            said = judge(case, given)
            missed += not (said.found and said.first)
            word = "MISSED" if not said.found else "OK" if said.first else "NOT FIRST"
            print(f"{word} {case.name}: {case.fault} (wanted {' or '.join(case.codes)} in {' or '.join(case.roles)})")
            print(f"   roots: {', '.join(said.roots) or 'none'}; all: {', '.join(said.all) or 'none'}", end="; ")
            print(f"{said.passes} passes, {said.steps} steps, {time.perf_counter() - started:.1f} s")
            for line in said.failed:
                print(f"   {line}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
