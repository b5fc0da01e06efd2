# SPDX-License-Identifier: Apache-2.0
"""Images a second of training ResNet-50 on one device, rung by rung: what each setting of the recipe is worth.

    python benchmarks/throughput.py                                      # the ladder, as far as --seconds_limit goes
    python benchmarks/throughput.py --rungs compile --image_sizes 224    # one rung, at every batch size

The network, the optimizer and the loss are those of recipes/resnet.py. Random uint8 images lie on the device and are
normalised there in every step, as shared/data/loaders.py does it: no input pipeline, no gradient norm, no schedule.

Each rung adds to the former: fp32, tf32, amp, channels_last, compile, fused_sgd. The last three each change one thing
of fused_sgd: one_graph compiles normalisation, network and loss together; cuda_graph (mode reduce-overhead) and
compile_max_autotune (mode max-autotune-no-cudagraphs) compile the network in another mode.

The most telling cases come first, as a GPU's lease may be short; what compiles for minutes comes near the end.
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import report
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from shared.accelerator import LEAST_CAPABILITY
from shared.data.loaders import MEAN, STD

RESNET = report.load_recipe("resnet")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
OLD_GPU = ON_GPU and torch.cuda.get_device_capability() < LEAST_CAPABILITY["bf16"]  # before Ampere: no tf32 either
HALF = "fp16" if OLD_GPU else "bf16"
CLASSES = 1000
TELLING = (256, 512)
SWEPT = ("channels_last", "compile")
PARTLY = f"then only {' and '.join(SWEPT)} go beyond batches {TELLING[0]} and {TELLING[1]}, where these are among them"
PROFILE_SECONDS = 60  # kept back from the budget: the fastest case is built once more to be profiled


class Case(NamedTuple):
    rung: str
    image_size: int
    batch_size: int


@dataclass(frozen=True)
class Rung:
    """What one rung of the ladder sets; a greater `delay` is measured later, see `planned`."""

    precision: str
    channels_last: bool = False
    compiled: str = ""  # nothing, the model, or the graph from pixels to loss
    mode: str = "default"
    fused_sgd: bool = False
    delay: int = 0


FUSED = Rung(HALF, channels_last=True, compiled="model", fused_sgd=True, delay=3)
RUNGS = {
    "fp32": Rung("fp32", delay=1),
    "tf32": Rung("tf32", delay=1),
    "amp": Rung(HALF, delay=1),
    "channels_last": Rung(HALF, channels_last=True),
    "compile": Rung(HALF, channels_last=True, compiled="model"),
    "fused_sgd": FUSED,
    "one_graph": replace(FUSED, compiled="graph"),
    "cuda_graph": replace(FUSED, mode="reduce-overhead"),
    "compile_max_autotune": replace(FUSED, mode="max-autotune-no-cudagraphs", delay=5),
}
if not ON_GPU:
    RUNGS = {name: replace(RUNGS[name], delay=0) for name in ("fp32", "amp", "channels_last", "compile")}
elif OLD_GPU:
    del RUNGS["tf32"]


def planned(arguments: argparse.Namespace) -> list[Case]:
    """All cases, the most telling first. A rung that --rungs names is measured at every batch size."""
    telling = [size for size in TELLING if size in arguments.batch_sizes] or arguments.batch_sizes[-2:]

    def order(case: Case) -> tuple:
        position = arguments.image_sizes.index(case.image_size)
        delay = RUNGS[case.rung].delay + 2 * min(position, 1) + 4 * (case.batch_size not in telling)
        return delay, position, case.batch_size

    cases = itertools.product(arguments.rungs or RUNGS, arguments.image_sizes, arguments.batch_sizes)
    swept = arguments.rungs or SWEPT
    return sorted((Case(*case) for case in cases if case[0] in swept or case[2] in telling), key=order)


def build_loss(model: nn.Module, rung: Rung, label_smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of images (B, H, W, 3) uint8 and labels (B,), compiled as the rung says."""
    layout = torch.channels_last if rung.channels_last else torch.contiguous_format
    mean, std = (torch.tensor(value, device=DEVICE).view(1, 3, 1, 1) for value in (MEAN, STD))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(rung.precision)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout).sub_(mean).div_(std)
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            return cross_entropy(model(images), labels, label_smoothing=label_smoothing)

    # With dynamic shapes the second batch size would be compiled for every size, and run slower.
    if rung.compiled == "model":
        model.compile(mode=rung.mode, dynamic=False)
    return torch.compile(loss_of, mode=rung.mode, dynamic=False) if rung.compiled == "graph" else loss_of


def build_step(case: Case) -> Callable[[], Tensor]:
    """A function that trains one step, on the next of the resident batches, and returns the loss."""
    rung = RUNGS[case.rung]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = rung.precision != "fp32"
    torch.manual_seed(0)
    config = RESNET.Config(model="resnet50", image_size=case.image_size, channels_last=rung.channels_last)
    model = RESNET.build_model(config, CLASSES).to(DEVICE)
    if rung.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer, _ = RESNET.build_optimizer(model, config, steps_per_epoch=1000)
    if rung.fused_sgd:
        optimizer = torch.optim.SGD([group | {"fused": True} for group in optimizer.param_groups], fused=True)
    scaler = torch.amp.GradScaler(DEVICE, enabled=rung.precision == "fp16")
    loss_of = build_loss(model, rung, config.label_smoothing)
    pixels = 4, case.batch_size, case.image_size, case.image_size, 3  # more bytes than a GPU's cache holds
    images = torch.randint(256, pixels, dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(CLASSES, pixels[:2], device=DEVICE)
    batches = itertools.cycle(zip(images, labels, strict=True))

    def step() -> Tensor:
        if rung.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(*next(batches))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def warmed_up(case: Case, warmup_steps: int) -> tuple[Callable[[], Tensor], float]:
    """The step function after its warm-up, and the seconds of its first call, which compiles."""
    report.release_memory()
    step = build_step(case)
    begin = time.perf_counter()
    step().item()  # waits for the device
    first = time.perf_counter() - begin
    for _ in range(warmup_steps - 1):
        step()
    return step, first


def measure(case: Case, arguments: argparse.Namespace) -> dict:
    """The figures of one case."""
    step, first = warmed_up(case, arguments.warmup_steps)
    rate = report.median_and_spread(
        case.batch_size / seconds for seconds in report.step_seconds(step, arguments.steps)
    )
    tflops = rate["median"] * training_flops(case.image_size) / 1e12
    peak = report.peak_tflops(RUNGS[case.rung].precision)
    return {
        "images_per_second": rate,
        "tflops_per_second": round(tflops, 3),
        "share_of_peak": round(tflops / peak, 4) if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
        "first_step_seconds": round(first, 2),
        "loss": step().item(),
    }


def training_flops(image_size: int) -> int:
    """Of one image. The backward has two products for each of the forward's: times 3; a multiply-add counts as 2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        RESNET.build_model(RESNET.Config(model="resnet50"), CLASSES).eval()(torch.empty(1, 3, image_size, image_size))
    return 3 * counter.get_total_flops()


def climb(results: dict[Case, dict], arguments: argparse.Namespace) -> None:
    """Measure the cases in their order and save after each; batches beyond one that ran out of memory are left out."""
    full = {}
    for case in results:
        if case.batch_size > full.get(case[:2], math.inf):
            results[case] = {"error": f"left out: batch {full[case[:2]]} ran out of memory"}
            continue
        try:
            results[case] = measure(case, arguments)
        except Exception as error:
            results[case] = {"error": report.failure(error)}
        if results[case].get("error") == "out of memory":
            full[case[:2]] = case.batch_size
        save(results, arguments)
        print(report.table([case._asdict() | results[case]]).splitlines()[-1], flush=True)


def save(results: dict[Case, dict], arguments: argparse.Namespace) -> list[dict]:
    """Write the rows, in the ladder's order, and return them."""
    cases = sorted(results, key=lambda case: (-case.image_size, list(RUNGS).index(case.rung), case.batch_size))
    rows = [case._asdict() | results[case] for case in cases]
    settings = {name: vars(arguments)[name] for name in ("steps", "warmup_steps", "seconds_limit")}
    report.write("throughput", rows, model="resnet50", amp=HALF, cudnn_benchmark=True, **settings)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, batch_sizes, steps = parser.add_argument, *(("64,128,256,512,1024", 20) if ON_GPU else ("8,16", 5))
    add("--rungs", type=lambda text: text.split(","), help=f"some of {','.join(RUNGS)} (all; {PARTLY})")
    add("--image_sizes", type=integers, default="224,176", help="pixels, the most important first (%(default)s)")
    add("--batch_sizes", type=integers, default=batch_sizes, help="images per step, rising (here %(default)s)")
    add("--steps", type=int, default=steps, help="measured steps of each case (here %(default)s)")
    add("--warmup_steps", type=int, default=steps // 3, help="steps before these, not measured (here %(default)s)")
    add("--seconds_limit", type=float, default=500, help="for everything; what is left out is recorded (%(default)s)")
    add("--profile", type=Path, metavar="FOLDER", help="write there what the fastest case spends its time on")
    arguments = parser.parse_args()
    for rung in set(arguments.rungs or ()) - set(RUNGS):
        parser.error(f"--rungs {rung} is unknown on this device. Known: {', '.join(RUNGS)}.")
    return arguments


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: argparse.Namespace) -> None:
    end = time.perf_counter() + arguments.seconds_limit
    torch.backends.cudnn.benchmark = True
    results = {case: {"error": "left out: no time"} for case in planned(arguments)}
    with report.budget(arguments.seconds_limit - PROFILE_SECONDS * bool(arguments.profile)):
        climb(results, arguments)
    print(report.table(save(results, arguments)), flush=True)
    if arguments.profile:
        # Not by images, of which smaller ones would always win.
        fastest = max(results, key=lambda case: results[case].get("tflops_per_second", 0))
        with report.budget(end - time.perf_counter()):
            step, _ = warmed_up(fastest, arguments.warmup_steps)
            report.write_profile(arguments.profile / f"profile_{'_'.join(map(str, fastest))}.txt", step)


if __name__ == "__main__":
    main(parse())
