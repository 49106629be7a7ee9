"""A training program to be watched: PPO by hand on four small models; prints a digest of what it has trained."""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from loops import backbone_direct


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--fail", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    made = backbone_direct.build()
    for _ in range(given.iterations):
        made["step"]()
    digest = hashlib.sha256()
    for parameter in (*made["policy"].parameters(), *made["value"].parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    print(f"digest {digest.hexdigest()}", flush=True)
    if given.fail:
        raise RuntimeError("the disk is full")


if __name__ == "__main__":
    main()
