# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and a run's files in one process: what is kept, quarantined, refused, and continues after a failure."""

import contextlib
import errno
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, flip
from torch import Tensor, nn

from shared import checkpoint, files, lifetime
from shared.checkpoint import (
    Checkpoints,
    SaveError,
    checkpoint_to_resume,
    checkpoints,
    damage,
    deepspeed,
    load_checkpoint,
    tensors,
)
from shared.checkpoint import save as saving
from shared.errors import UserError
from shared.run import folder as run_folder
from shared.run import nonfinite
from shared.run.interruption import Interruption
from shared.run.log import Log
from shared.run.nonfinite import NonFinite

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, scaler=None, mesh=None)
ALONE.device = torch.device("cpu")


def trained(steps: int = 1, size: int = 20) -> tuple[nn.Module, torch.optim.Optimizer, object]:
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    for _ in range(steps):
        model(torch.ones(1, size)).sum().backward()
        optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def saved(folder: Path, *steps: int, **manifest) -> Checkpoints:
    """Checkpoints of these steps, each with a network of its own."""
    kept = Checkpoints(folder, ALONE, {}, keep=9, background=False)
    for step in steps:
        kept.save(*trained(), {"step": step}, manifest)
    return kept


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is resumed, and what lies past it


def test_what_is_damaged_is_quarantined_and_its_step_written_again(tmp_path):
    kept = saved(tmp_path, 4, 8)
    flip(tmp_path / "step-00000008/tensors-00000.safetensors")  # of equal size: only the checksum tells
    found, (line,) = checkpoint_to_resume(tmp_path, "auto")
    assert found.name == "step-00000004"
    assert "step-00000008 is damaged" in line
    checkpoint.quarantine(tmp_path, found)
    assert names(tmp_path) == ["quarantined-00000008", "step-00000004"]
    kept.keep = 2
    for step in (8, 12):
        kept.save(*trained(), {"step": step}, {})
    assert names(tmp_path) == ["quarantined-00000008", "step-00000008", "step-00000012"]
    assert not [damage(path) for path in checkpoints(tmp_path) if damage(path)]


def test_a_checkpoint_that_is_there_is_never_replaced_by_a_part(tmp_path):
    kept = saved(tmp_path, 4)
    before = (tmp_path / "step-00000004/manifest.json").read_bytes()
    with pytest.raises(SaveError, match="not empty"):
        kept.save(*trained(), {"step": 4}, {})
    assert names(tmp_path) == ["step-00000004"]
    assert (tmp_path / "step-00000004/manifest.json").read_bytes() == before


def test_a_path_begins_a_run_or_takes_it_back_once(tmp_path):
    seed, folder = tmp_path / "a/checkpoints", tmp_path / "b/checkpoints"
    saved(seed, 4, 8)
    path = (seed / "step-00000004").resolve()
    assert checkpoint_to_resume(folder, str(path))[0] == path
    saved(folder, 6, begun_from=str(path))
    assert checkpoint_to_resume(folder, str(path))[0].name == "step-00000006"  # a job that was started again
    assert checkpoint_to_resume(folder, str(seed / "step-00000008"))[0] == (seed / "step-00000008").resolve()
    # Back, in its own folder
    assert checkpoint_to_resume(seed, str(path))[0] == path
    checkpoint.quarantine(seed, path)
    assert names(seed) == ["quarantined-00000008", "step-00000004"]
    saved(seed, 6, begun_from=str(path))
    assert checkpoint_to_resume(seed, str(path))[0].name == "step-00000006"
    path.rename(path.with_name("gone"))  # as too old
    assert checkpoint_to_resume(seed, str(path))[0].name == "step-00000006"


def test_the_most_accurate_one_stays_when_it_is_older_than_the_last_two(tmp_path):
    kept = Checkpoints(tmp_path, ALONE, {}, keep=2, background=False)
    for step, accuracy in ((4, 0.5), (8, 0.9), (12, 0.7), (16, None), (20, 0.9 - 1e-9)):
        kept.save(*trained(), {"step": step}, {"accuracy": accuracy})
    assert names(tmp_path) == ["step-00000008", "step-00000016", "step-00000020"]


def test_a_run_without_one_step_of_its_optimizer_resumes(tmp_path):
    """As when the gradient scaler, or --on_nonfinite skip, has left out every step so far."""
    model, optimizer, scheduler = trained(steps=0)
    Checkpoints(tmp_path, ALONE, {}, 2, False).save(model, optimizer, scheduler, {"step": 3}, {})
    other = trained(steps=2)
    load_checkpoint(tmp_path / "step-00000003", ALONE, *other)
    torch.testing.assert_close(dict(other[0].state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert not other[1].state
    for network, steps in ((model, optimizer), (other[0], other[1])):
        network.zero_grad()
        network(torch.ones(1, 20)).sum().backward()
        steps.step()
    torch.testing.assert_close(dict(other[0].state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def test_what_an_optimizer_counts_is_saved_or_refused(tmp_path):
    """In its groups, as a number or a tensor, where all groups agree; a number for one parameter would be lost."""
    model, optimizer, scheduler = trained()
    optimizer.param_groups[0] |= {"k": 7, "step": torch.tensor(7.0)}
    Checkpoints(tmp_path, ALONE, {}, 2, False).save(model, optimizer, scheduler, {"step": 3}, {})
    for changed, expected in (((), (7, 7.0)), (("k",), (1, 7.0))):
        other = trained()
        other[1].param_groups[0] |= {"k": 1, "step": torch.tensor(1.0)}
        load_checkpoint(tmp_path / "step-00000003", ALONE, *other, changed)
        (group,) = other[1].param_groups
        assert (group["k"], group["step"].item()) == expected
        assert group["lr"] == optimizer.param_groups[0]["lr"]
    optimizer.state[model.weight]["count"] = 3
    with pytest.raises(UserError, match="AdamW keeps `count` of each parameter as a number"):
        Checkpoints(tmp_path, ALONE, {}, 2, False).save(model, optimizer, scheduler, {"step": 4}, {})
    assert names(tmp_path) == ["step-00000003"]


def test_a_scaler_that_the_checkpoint_has_not_starts_at_its_default(tmp_path):
    saved(tmp_path, 3)
    scaler = torch.amp.GradScaler("cpu")
    load_checkpoint(tmp_path / "step-00000003", SimpleNamespace(**{**vars(ALONE), "scaler": scaler}), *trained())
    assert scaler.get_scale() == 65536


@pytest.mark.parametrize(
    ("wrote", "here"),
    [
        (("fsdp", 2), ("zero2", 2)),
        (("zero2", 2), ("ddp", 2)),
        (("zero2", 2), ("zero3", 2)),
        (("zero3", 2), ("zero3", 4)),
    ],
)
def test_deepspeeds_state_is_refused_elsewhere_with_the_way_out(tmp_path, monkeypatch, wrote, here):
    folder = tmp_path / "run/checkpoints"
    saved(folder, 3, strategy=wrote[0], world_size=wrote[1])
    monkeypatch.setattr(deepspeed, "strategy", lambda: here[0])
    with pytest.raises(UserError) as caught:
        load_checkpoint(
            folder / "step-00000003", SimpleNamespace(**{**vars(ALONE), "num_processes": here[1]}), *trained()
        )
    for words in (
        f"written by {wrote[0]} on {wrote[1]} processes; this run is {here[0]} on {here[1]}",
        f"python tools/export.py {tmp_path}/run weights",
        "--pretrained weights",
    ):
        assert words in str(caught.value)


def test_deepspeed_that_finds_nothing_is_an_error(monkeypatch):
    engine = SimpleNamespace(load_checkpoint=lambda *given, **named: (None, {}))
    with pytest.raises(OSError, match="nothing to load"):
        deepspeed.load_zero(Path("x"), engine)


# Failures


@pytest.mark.parametrize("kind", [OSError, MemoryError, TypeError])
@pytest.mark.parametrize("background", [False, True])
def test_whatever_goes_wrong_costs_that_checkpoint_alone(tmp_path, monkeypatch, kind, background):
    """In the background it is told by the next `wait`, once, and a save after it is none the worse."""
    kept = Checkpoints(tmp_path, ALONE, {}, 2, background)
    monkeypatch.setattr(saving, "_finish", failing(saving._finish, kind))

    def save(step):
        kept.save(*trained(), {"step": step}, {})
        if error := kept.wait():
            raise error

    with pytest.raises(SaveError, match="no room"):
        save(1)
    assert not names(tmp_path)
    save(2)
    assert kept.wait() is None
    assert names(tmp_path) == ["step-00000002"]


def failing(function: Callable, kind: type) -> Callable:
    """It fails the first time."""
    failures = [kind("no room")]

    def called(*given):
        if failures:
            raise failures.pop()
        return function(*given)

    return called


def test_what_a_save_in_the_background_takes_is_the_whole_of_it(tmp_path, monkeypatch):
    """The last save of a run waits for it, so the deadline must leave that much."""
    go, written = threading.Event(), tensors.TensorWriter.write_data
    monkeypatch.setattr(tensors.TensorWriter, "write_data", lambda *given: go.wait() and written(*given))
    kept = Checkpoints(tmp_path, ALONE, {}, 2, background=True)
    begin = time.monotonic()
    kept.save(*trained(), {"step": 1}, {})
    assert kept.failure() is None
    assert kept.seconds == 0
    time.sleep(0.3)
    go.set()
    assert kept.wait() is None
    assert 0.3 <= kept.seconds <= time.monotonic() - begin


def test_no_part_of_deepspeeds_files_stays_and_no_process_leaves_its_barriers(tmp_path, monkeypatch):
    """Its files fail within save_checkpoint, which must still run to its end."""
    ended, folder = [], tmp_path / "tmp-00000001"

    def save_checkpoint(place, tag, save_latest):
        engine.checkpoint_engine.save(state_dict={}, path=f"{place}/zero/a.pt")
        ended.append(True)

    def full(state, path):
        raise RuntimeError("unexpected pos 64 vs 0")

    engine = SimpleNamespace(checkpoint_engine=SimpleNamespace(save=full), save_checkpoint=save_checkpoint)
    monkeypatch.setattr(saving, "write_zero", lambda place, *_: raise_first(deepspeed._save_zero(place, engine)))
    monkeypatch.setattr(saving, "strategy", lambda: "zero2")
    with pytest.raises(SaveError, match="unexpected pos"):
        Checkpoints(tmp_path, ALONE, {}, 2, False).save(*trained(), {"step": 1}, {})
    assert ended == [True]
    assert engine.checkpoint_engine.save is full
    assert not folder.exists()


def raise_first(failures: list[Exception]) -> None:
    raise failures[0]


def test_a_signal_counts_where_nobody_reads_the_output(tmp_path, monkeypatch):
    """Ctrl-C ends the `tee` of `2>&1 | tee log` first."""

    def closed(descriptor, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    handlers = {number: signal.getsignal(number) for number in lifetime.SIGNALS}
    try:
        watched = Interruption(ALONE, tmp_path, 0)
        monkeypatch.setattr(os, "write", closed)
        signal.raise_signal(signal.SIGINT)
        assert watched.agreed(1) == "signal"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("launcher", "stops"), [("", ""), ("none", "signal")])
def test_nohup_lets_a_run_outlive_its_terminal_but_not_torchrun(tmp_path, monkeypatch, launcher, stops):
    """Which takes SIGHUP whatever nohup has set, passes it on, and kills its workers 30 s later."""
    handlers = {number: signal.getsignal(number) for number in lifetime.SIGNALS}
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launcher)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        watched = Interruption(ALONE, tmp_path, 0)
        signal.raise_signal(signal.SIGHUP)
        assert watched.agreed(1) == stops
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# The run's files


def test_lines_that_found_no_room_stand_once_when_there_is_some(tmp_path, monkeypatch):
    log = Log(ALONE, tmp_path)
    metrics = log.metrics
    metrics.drop_after(0)
    room = [1000, 3, 0, 1000]  # bytes that each write finds

    class Small(io.FileIO):
        def write(self, data):
            return super().write(data[: room.pop(0)])

    monkeypatch.setattr(run_folder, "open", lambda path, mode, buffering: Small(path, mode), raising=False)
    for step in range(1, 5):
        with log.bearing("metrics.jsonl"):
            metrics.append({"step": step})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 5))
    assert not metrics.unwritten


def test_files_that_a_loss_of_power_emptied_are_as_if_absent(tmp_path):
    for content in (b"", b"\0\0\0", b'{"status": "fin', b"[1]", b"\xff\xfe"):
        (tmp_path / "summary.json").write_bytes(content)
        assert run_folder.read_json(tmp_path / "summary.json") == {}
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n7\n{"step": 2}\n{"step": 3')
    run_folder.MetricsFile(tmp_path / "metrics.jsonl").drop_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    files.write_json(tmp_path / "config.json", {"a": 1})
    assert calls == ["fsync", "replace"]


# Numbers that are none


@pytest.mark.parametrize(
    "spoil", [lambda loss: loss + math.nan, lambda loss: loss + math.inf, lambda loss: loss * math.nan]
)
def test_the_loops_factor_spoils_the_gradients_that_others_see(spoil):
    """Also of a loss whose gradients would be finite, as with the logarithm of a constant."""
    model = nn.Linear(4, 1)

    def norm(change: Callable[[Tensor], Tensor], factor: Callable[[Tensor], Tensor]) -> Tensor:
        model.zero_grad()
        loss = change(model(torch.ones(2, 4)).square().mean())
        (loss * factor(loss)).backward()
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])

    def loops(loss: Tensor) -> Tensor:
        return 1 + 0 * loss.detach()

    assert norm(lambda loss: loss, loops) == norm(lambda loss: loss, torch.ones_like)
    assert not norm(spoil, loops).isfinite()
    recipes = [path for path in (ROOT / "recipes").glob("*.py") if "accelerator.backward(" in path.read_text()]
    assert all("(1 + 0 * loss.detach())" in path.read_text() for path in recipes if path.stem != "vit_zero")


def policy(name: str, folder: Path, scale: float | None = None) -> NonFinite:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    return NonFinite(SimpleNamespace(**{**vars(ALONE), "scaler": scaler}), name, run_folder.Folder(folder))


def test_stop_reads_a_step_when_the_next_one_is_done(tmp_path):
    steps = policy("stop", tmp_path)
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    steps.note(5, 1.5, [torch.zeros((), device="meta")], [])  # DeepSpeed's norm is a number, of another device
    steps.note(6, torch.tensor(math.nan), [torch.tensor(math.inf)], [torch.tensor([3, 8])])
    assert not steps.skips_update()
    steps.check(but_last=True)
    steps.note(7, torch.tensor(1.0), [torch.tensor(1.0)], [torch.tensor([4])])
    with pytest.raises(UserError, match=r"step 6 has the losses inf and the gradient norm nan, from samples 3, 8 "):
        steps.check(but_last=True)
    record = run_folder.read_json(tmp_path / "nonfinite.json")
    assert (record["step"], record["processes"][0]["samples"]) == (6, [3, 8])


def test_skip_decides_before_the_update(tmp_path):
    steps = policy("skip", tmp_path)
    steps.note(1, torch.tensor(math.inf), [torch.tensor(1.0)], [])
    assert steps.skips_update()
    steps.note(2, torch.tensor(1.0), [torch.tensor(1.0)], [])
    assert not steps.skips_update()
    steps.check()


def test_under_fp16_the_scaler_looks_for_its_scale_before_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "mixed_precision", lambda: "fp16")
    for name, scale, stops in (("stop", 1.0, False), ("stop", 0.5, True), ("skip", 0.5, False)):
        steps = policy(name, tmp_path, scale)
        steps.note(1, torch.tensor(math.inf), [torch.tensor(math.inf)], [])
        assert not steps.skips_update()  # the scaler leaves the step out, when the optimizer is called
        with pytest.raises(UserError, match="step 1 has the losses inf") if stops else contextlib.nullcontext():
            steps.check()


@pytest.mark.parametrize(("better", "best"), [(True, 3), (False, 1)])
def test_the_best_checkpoint_stays_by_its_metrics_direction(tmp_path, better, best):
    for step, value in ((1, 0.2), (2, 0.5), (3, 0.9), (4, 0.4), (5, 0.6)):
        saved(tmp_path, step, metric="bits", bits=value, higher_is_better=better)
    assert [path.name[-1] for path in checkpoint.retention.superfluous(tmp_path, 1)] == [
        str(step) for step in range(1, 5) if step != best
    ]
