# SPDX-License-Identifier: Apache-2.0
"""Save and load the state that DeepSpeed owns.

Its files are pickles. Their checksums are verified before they are opened, which finds damage but no tampering: resume
ZeRO only from your own folders.
"""

from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import UserError
from ..files import to_disk
from ..launch import strategy
from .retention import read_manifest

ZERO = "zero"  # DeepSpeed's folder within a checkpoint


def write_zero(folder: Path, accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Write DeepSpeed's own shards; return, on rank 0, the whole weights in fp32 under their plain names."""
    from deepspeed.utils import safe_get_full_fp32_param

    failures = _save_zero(folder, model)
    weights = {}
    for name, parameter in model.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)  # gathers: every process must call it
        if accelerator.is_main_process:
            weights[f"model.{name}"] = whole.cpu()
    if failures:
        raise failures[0]
    return weights


def _save_zero(folder: Path, model: nn.Module) -> list[Exception]:
    """Write this process's files and return the errors. One raised within save_checkpoint would leave the other
    processes in its barriers, so the caller raises it when all are done."""
    engine, failures = model.checkpoint_engine, []
    write = engine.save

    def save(state_dict: dict, path: str) -> None:
        try:
            write(state_dict, path)
            to_disk(path)
        except Exception as error:
            failures.append(error)

    model._copy_recovery_script = lambda folder: None  # it could fail as well, and tools/export.py needs no script
    engine.save = save
    model.save_checkpoint(str(folder), tag=ZERO, save_latest=False)
    engine.save = write
    return failures


def refuse_other_zero(path: Path, processes: int) -> None:
    """Raise UserError where DeepSpeed's state was written under another stage or number of processes."""
    manifest = read_manifest(path)
    wrote, here = (manifest.get("strategy"), manifest.get("world_size")), (strategy(), processes)
    if wrote != here and "zero" in f"{wrote}{here}":
        raise UserError(
            f"{path} was written by {wrote[0]} on {wrote[1]} processes; this run is {here[0]} on {here[1]}. Resume as "
            f"it was written, or start from its weights: `python tools/export.py {path.parent.parent} weights`, then "
            "--pretrained weights and another --output_dir."
        )


def load_zero(path: Path, model: nn.Module) -> None:
    loaded, _ = model.load_checkpoint(str(path), tag=ZERO)
    if loaded is None:
        raise OSError("DeepSpeed found nothing to load")
