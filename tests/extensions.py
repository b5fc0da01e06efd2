# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's compiled parts, whose making takes minutes: as a program, make them where the suite's launches look.

One folder for each environment and processor, kept from run to run. In torch's own, which all environments share, each
compiles what the other one made, for its headers lie elsewhere.
"""

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

BUILDERS = ("ShareMemCommBuilder", "CPUAdamBuilder")


def folder() -> str:
    """Return TORCH_EXTENSIONS_DIR for this environment, which is built for this processor alone."""
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
    key = f"{sys.prefix} {sys.version} {version('torch')} {version('deepspeed')} {processor[:1]}"
    name = f"extensions-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return str(Path.home() / ".cache/dlojz-recipes/tests" / name)


def main() -> None:
    """Make them with the whole machine, before the suite: beside it the compiler took up to 28 minutes, for which
    launches that need the parts waited in vain."""
    os.environ["TORCH_EXTENSIONS_DIR"] = folder()
    from deepspeed.accelerator import get_accelerator

    with FileLock(f"{folder()}.lock"):
        for lock in Path(folder()).glob("*/lock"):
            lock.unlink()  # of a compiler that was killed: torch waits for it for ever
        for name in BUILDERS:
            builder = get_accelerator().create_op_builder(name)
            if builder.is_compatible(verbose=False):
                builder.load()


if __name__ == "__main__":
    main()
