# SPDX-License-Identifier: Apache-2.0
"""A loader's worker processes: the memory that they share, their ends, and waits for them, which have an end too."""

import gc
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import loading
import pytest
import torch
from conftest import launch_command, wait_for
from forked import children
from loading import build, loaders_of
from torch.utils.data import DataLoader, get_worker_info

from shared.errors import UserError
from shared.images import Views
from shared.images import loader as loaders
from shared.images.loader import WorkerLoader, worker_options
from shared.lifetime import SIGNALS, one_line
from shared.run.interruption import Interruption

pytestmark = pytest.mark.slow

surroundings, packed = loading.surroundings, loading.packed


@pytest.fixture(scope="module")
def reference() -> list:
    return list(loaders_of("digits")[0])


@pytest.mark.parametrize("prefetch_factor", [1, 4])
def test_a_batch_in_use_stays_what_it_is_while_others_are_made(prefetch_factor):
    views = loaders_of("digits")[0].dataset
    expected = [(batch.images.clone(), batch.labels) for batch in views_in(views, 0, prefetch_factor)]
    for (images, labels), batch in zip(expected, views_in(views, 1, prefetch_factor), strict=True):
        time.sleep(0.02)  # longer than the worker needs to fill what it may
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def views_in(views: Views, num_workers: int, prefetch_factor: int) -> DataLoader:
    options = worker_options(views, num_workers, torch.device("cpu"), prefetch_factor)
    return DataLoader(views, batch_sampler=views.order, **options)


def by_worker(views: Views, seconds: Callable[[int], float]) -> Views:
    """Write into each image's red the number of the worker that rendered it, into its green and blue a byte of its
    seed. seconds: how long a worker takes for one image."""

    def render(data, view, seed, out) -> bool:
        worker = get_worker_info().id
        time.sleep(seconds(worker))
        out[..., 0], out[..., 1:] = worker, seed & 255
        return False

    return replace(views, render=render)


def is_whole(batch, expected) -> bool:
    """Return whether no other batch was written over its images or its numbers."""
    seeds = (expected.seeds & 255).view(-1, 1, 1, 1)
    return batch.digest == expected.digest and bool((batch.images[..., 1:] == seeds).all())


def test_a_slow_worker_holds_up_only_its_own_batches(reference):
    """The other worker's wait for their turn; it overwrites none of them before it was read."""
    views = by_worker(loaders_of("digits")[0].dataset, lambda worker: 0 if worker else 0.01)
    makers = []
    for batch in WorkerLoader(views, 2, torch.device("cpu")):
        makers.append(int(batch.images[0, 0, 0, 0]))
        time.sleep(0.01)
        assert is_whole(batch, reference[len(makers) - 1])
    assert len(makers) == 22
    assert 1 <= makers.count(0) <= 5  # its first takes 0.64 s


def test_a_worker_that_stands_still_is_waited_for(reference):
    """The other worker waits too, when its memory is full. An epoch that is left then and begun again has the right
    batches."""
    begun = time.monotonic()
    views = loaders_of("digits")[0].dataset
    slow = by_worker(views, lambda worker: 0.001 if worker or time.monotonic() > begun + 2 else 2)
    reader = WorkerLoader(slow, 2, torch.device("cpu"))
    left = iter(reader)
    assert next(left).digest == reference[0].digest
    assert time.monotonic() > begun + 2
    assert reader.numbered.asked < 22  # of the epoch
    for number, batch in enumerate(reader):
        if number == 3:
            left.close()  # late, while the workers are at the next ones
            time.sleep(0.3)
        assert is_whole(batch, reference[number])
    assert number == 21


# Their ends


def in_a_fork(run: Callable[[], object]) -> tuple[int, str]:
    """Run in a fork of this process; return its status and what it wrote to stderr, once its workers have ended."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(write, 2)
        sys.stderr = sys.__stderr__
        os.close(read)
        os.close(write)
        try:
            run()
        except BaseException:
            one_line(*sys.exc_info())
        os._exit(99)
    os.close(write)
    with open(read) as file:
        said = file.read()  # until no process has it open
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def test_a_worker_that_waits_ends_with_its_process():
    views = by_worker(loaders_of("digits")[0].dataset, lambda worker: 0 if worker else 0.03)  # 1.9 s a batch

    def run():
        reader = WorkerLoader(views, 2, torch.device("cpu"))
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        next(iter(reader))

    assert in_a_fork(run) == (-signal.SIGKILL, "")


def refuse():
    raise UserError("refused")


@pytest.mark.parametrize(
    ("end", "seconds", "expected"),
    [
        (refuse, 1000, (1, "error: refused\n")),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 1, (-signal.SIGKILL, "")),
    ],
    ids=["refusal", "SIGKILL"],
)
def test_a_worker_that_has_only_begun_ends_with_its_process(end, seconds, expected, monkeypatch):
    """torch's own worker would stay: it takes the process that is its parent when it first looks."""
    monkeypatch.setattr(loaders, "ignore_signals", lambda: time.sleep(seconds))  # in the worker
    views = loaders_of("digits")[0].dataset

    def run():
        reader = WorkerLoader(views, 3, torch.device("cpu"))  # noqa: F841  it lives until the end
        end()

    assert in_a_fork(run) == expected


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [("resnet", {}), ("resnet_torchdata", {"pipeline": "dataloader"}), ("resnet_webdataset", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worker_that_is_killed_is_one_line(packed, recipe, flags, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    before = {worker.pid for worker in multiprocessing.active_children()}
    loader, _ = build(recipe, packed["tar"], num_workers=1, **flags)
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        if worker.pid not in before:
            worker.kill()
    why = r"(DataLoader worker|\w+Error\)|\[Errno)"  # torch's word, or what reading from it ended with
    with pytest.raises(
        UserError, match=rf"^rank 3: a loader worker died, perhaps for lack of memory \({why}"
    ) as raised:
        list(batches)
    assert raised.value.alone
    shut_down()


def shut_down() -> None:
    """Shut the workers of all loaders down. The error's traceback and its frames are a cycle that keeps a loader: the
    garbage collector may close its pipes first, and the loader, which shuts down later, closes those file descriptors
    once more, which are other files by then (Python 3.11's Connection.__del__ keeps its handle)."""
    for each in gc.get_objects():
        if hasattr(type(each), "_shutdown_workers"):
            each._shutdown_workers()


# What they need


@pytest.fixture
def long_path(tmp_path, monkeypatch):
    """Set a TMPDIR whose name is too long for a socket in it."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    yield
    multiprocessing.current_process()._config.pop("tempdir", None)


@pytest.mark.parametrize("recipe", ["resnet", "resnet_torchdata", "resnet_webdataset"])
def test_workers_need_no_sockets(recipe, packed, long_path):
    loader, _ = build(recipe, packed["tar"], num_workers=1)
    assert next(iter(loader)).images.shape == (64, 3, 32, 32)


def test_a_shared_memory_that_is_full_is_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a batch needs 197,000
    try:
        with pytest.raises(
            UserError, match=r"^loader workers get no 1189632 bytes of /dev/shm: .* Give fewer --num_workers"
        ):
            build("resnet", "digits", num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Waits have an end


def test_a_batch_that_never_comes_ends_the_program(monkeypatch):
    """Here it is a thread's, as DALI's batches are, and those of torchdata's nodes."""
    monkeypatch.setattr(loaders, "LIMIT", 1)
    dataset, future = build("resnet", "digits")[0].dataset, Future()
    loader = loaders.Loader(dataset, torch.device("cpu"), 0, read=lambda *_: (future.result() for _ in "a"))
    status, said = in_a_fork(lambda: list(loader))
    assert status == 1
    assert said.count("\n") == 1
    assert said.startswith("error: batch 1 of the training images did not come for 1 s. The loader hangs: check")


IMPATIENT = """
import runpy, sys
from shared.images import loader as loaders
loaders.PATIENCE = 1
runpy.run_path("recipes/resnet.py", run_name="__main__")
"""


def test_a_signal_while_no_batch_comes_ends_the_run(runs, server, tmp_path):
    """Its workers are stopped, as by a storage that does not answer; the run trains on what they had ready."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    flags = ["--image_size", "16", "--global_batch_size", "32", "--epochs", "100", "--num_workers", "1"]
    flags += ["--logging_steps", "1", "--checkpointing_steps", "2", "--report_to", "none"]
    flags += ["--output_dir", str(runs / "still")]
    launch = server.start([*launch_command()[2:], str(tmp_path / "impatient.py"), *flags])
    metrics = runs / "still/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 4)
    (training,) = launch.workers
    launch.kill(children(training), signal.SIGSTOP)
    size = 0
    while size < (size := metrics.stat().st_size):
        time.sleep(2)
    launch.kill([training], signal.SIGTERM)
    process = launch.wait()
    assert process.returncode == 1
    last = process.stdout.strip().splitlines()[-1]
    assert last.startswith("error: batch ")
    assert "so the run stops (signal) without a checkpoint of its last steps; the same command resumes it" in last
    assert list((runs / "still/checkpoints").glob("step-*"))


def test_who_waits_sees_every_reason_to_stop(tmp_path, monkeypatch):
    """Every process sees signals and the file: between steps rank 0, which has the deadline, cannot tell others."""
    monkeypatch.delenv("RECIPES_JOB_FOLDER", raising=False)
    main, other = (SimpleNamespace(is_main_process=first, num_processes=1) for first in (True, False))
    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert Interruption(main, tmp_path, 0.5).noted() == "deadline"
        interruption = Interruption(other, tmp_path, 1000)
        assert interruption.noted() == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.noted() == "signal"
        (tmp_path / "STOP").touch()
        assert Interruption(other, tmp_path, 1000).noted() == "stop_file"
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
