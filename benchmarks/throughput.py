# SPDX-License-Identifier: Apache-2.0
"""Measure images per second of training on one device, rung by rung: what each setting of a recipe is worth.

    python benchmarks/throughput.py                                   # ResNet-50 at 224 and 176 px; ViTs at 224 px
    python benchmarks/throughput.py --models B/16,L/16,H/14           # the Vision Transformers, patch size after /
    python benchmarks/throughput.py --rungs compile --image_sizes 224 # one rung
    python benchmarks/throughput.py --profile trace.json              # and where the time of the last case goes

Each rung adds to the last: fp32, tf32, amp (bf16; fp16 with a scaler before Ampere), channels_last, compile. Each is
measured at rising batch sizes until memory runs out. The network, the optimizer and the loss are those of
recipes/resnet.py or recipes/vit.py (no channels_last; compile by block); random uint8 images lie on the device and are
normalised there in every step, as shared/images/loader.py does it: no input pipeline. Writes
benchmarks/results/throughput_<hardware>_<date>.json.
"""

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from report import ROOT, median_and_spread, table, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "recipes"))
import resnet
import vit

from shared.accelerator import LEAST_CAPABILITY
from shared.images.loader import MEAN, STD
from shared.models.vit import SIZES

RUNGS = ["fp32", "tf32", "amp", "channels_last", "compile"]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
HALF = torch.float16 if ON_GPU and torch.cuda.get_device_capability() < LEAST_CAPABILITY["bf16"] else torch.bfloat16
CLASSES = 1000
RESNETS = get_args(resnet.MODELS)

# Dense peaks of the datasheets, TFLOP/s, by a part of the device's name: fp32, tf32, 16-bit.
PEAKS = {
    "V100": (15.7, None, 125),
    "A100": (19.5, 156, 312),
    "H100 80GB HBM3": (67, 494.5, 989),
    "H200": (67, 494.5, 989),
}


def build_network(name: str, image_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the network on the device, with its recipe's optimizer."""
    if name in RESNETS:
        config = resnet.Config(model=name)
        model = resnet.build_model(None, config, CLASSES, seed=0).to(DEVICE)
        return model, resnet.build_optimizer(model, config, steps_per_epoch=1000)[0]
    size, patch_size = name.split("/")
    images, config = vit.Images(image_size=image_size), vit.Config(model=size, patch_size=int(patch_size))
    model = vit.build_model(images, config, CLASSES, seed=0).to(DEVICE)
    return model, vit.build_optimizer(model, config, steps_per_epoch=1000)[0]


def rungs_of(name: str, image_size: int, rungs: list[str]) -> list[str]:
    """Return the rungs of a network: a ViT has no layout to choose, and one image size, which its patches tile, is
    enough."""
    if name in RESNETS:
        return rungs
    return [rung for rung in rungs if rung != "channels_last" and image_size == 224]


def build_step(name: str, rung: str, image_size: int, batch_size: int) -> Callable[[], Tensor]:
    """Return a function that trains one step on the next of the resident batches, and returns the loss."""
    height = RUNGS.index(rung)
    # As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 does for a recipe; a recipe's convolutions are in tf32 without it too.
    torch.set_float32_matmul_precision("high" if height >= RUNGS.index("tf32") else "highest")
    torch.backends.cudnn.allow_tf32 = height >= RUNGS.index("tf32")
    torch.backends.cudnn.benchmark = True
    by_channels = height >= RUNGS.index("channels_last") and name in RESNETS
    layout = torch.channels_last if by_channels else torch.contiguous_format
    model, optimizer = build_network(name, image_size)
    model.to(memory_format=layout).train()
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=height >= RUNGS.index("amp") and HALF is torch.float16)
    if rung == "compile":
        for part in [model] if name in RESNETS else model.vit.layers:
            part.compile(dynamic=False)
    mean, std = (torch.tensor(value, device=DEVICE).view(1, 3, 1, 1) for value in (MEAN, STD))
    # Four batches in turn: more bytes than a GPU's cache holds.
    pixels = torch.randint(256, (4, batch_size, image_size, image_size, 3), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(CLASSES, (4, batch_size), device=DEVICE)
    batches = itertools.cycle(zip(pixels, labels, strict=True))

    def step() -> Tensor:
        images, targets = next(batches)
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout).sub_(mean).div_(std)
        with torch.autocast(DEVICE.type, HALF, enabled=height >= RUNGS.index("amp")):
            loss = cross_entropy(model(images), targets, label_smoothing=0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step


def step_seconds(step: Callable[[], Tensor], steps: int) -> list[float]:
    """Return the seconds of each call; on a GPU between events in its queue, since calls return before the work is
    done."""
    if not ON_GPU:
        marks = [time.perf_counter(), *(step() is not None and time.perf_counter() for _ in range(steps))]
        return [end - begin for begin, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(events)]


def measure(name: str, rung: str, image_size: int, batch_size: int, arguments: argparse.Namespace) -> dict:
    """Return the figures of one case; raises torch.OutOfMemoryError on a GPU that is too small."""
    step = build_step(name, rung, image_size, batch_size)
    begin = time.perf_counter()
    step().item()  # compiles, and waits for the device
    first = time.perf_counter() - begin
    for _ in range(arguments.warmup_steps):
        step()
    seconds = step_seconds(step, arguments.steps)
    rate = median_and_spread(batch_size / each for each in seconds)
    tflops = rate["median"] * training_flops(name, image_size) / 1e12
    peak = peak_tflops(rung)
    if arguments.profile:
        profile(step, arguments.profile)
    return {
        "images_per_second": rate,
        "tflops": round(tflops, 3),
        "share_of_peak": round(tflops / peak, 4) if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
        "first_step_seconds": round(first, 2),
    }


def training_flops(name: str, image_size: int) -> int:
    """Return the FLOPs of one image. The backward has two products for each of the forward's: times 3; a
    multiply-add counts as 2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if name in RESNETS:
            model = resnet.build_model(None, resnet.Config(model=name), CLASSES, seed=0)
        else:
            size, patch_size = name.split("/")
            model = vit.VisionTransformer(vit.vit_config(size, image_size, int(patch_size), CLASSES, drop_path=0.0))
        model.eval()(torch.empty(1, 3, image_size, image_size))
    return 3 * counter.get_total_flops()


def peak_tflops(rung: str) -> float | None:
    name = torch.cuda.get_device_name() if ON_GPU else ""
    return next((peaks[min(RUNGS.index(rung), 2)] for part, peaks in PEAKS.items() if part in name), None)


def profile(step: Callable[[], Tensor], path: Path) -> None:
    """Print what a step spends its time on and write its trace."""
    with torch.profiler.profile() as profiler:
        step().item()
    key = f"self_{DEVICE.type}_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=80))
    profiler.export_chrome_trace(str(path))


def sweep(arguments: argparse.Namespace) -> list[dict]:
    """Return one row for each case, in the ladder's order; a larger batch is not tried where a smaller one had no
    room."""
    begin, rows = time.perf_counter(), []
    cases = [
        (name, rung, image_size)
        for name, image_size in itertools.product(arguments.models, arguments.image_sizes)
        for rung in rungs_of(name, image_size, arguments.rungs)
    ]
    for name, rung, image_size in cases:
        for batch_size in arguments.batch_sizes:
            row = {"model": name, "rung": rung, "image_size": image_size, "batch_size": batch_size}
            if time.perf_counter() - begin > arguments.seconds_limit:
                rows.append(row | {"left_out": "no time"})
                continue
            torch.compiler.reset()
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                rows.append(row | measure(name, rung, image_size, batch_size, arguments))
            except torch.OutOfMemoryError:
                rows.append(row | {"left_out": "out of memory"})
                break
            finally:
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    # tf32 is a mode of GPUs from Ampere on; elsewhere that rung would be fp32 again.
    here = [rung for rung in RUNGS if rung != "tf32" or (ON_GPU and HALF is torch.bfloat16)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, sizes, steps = parser.add_argument, *(("64,128,256,512,1024", 30) if ON_GPU else ("16", 4))
    add(
        "--models",
        type=lambda text: text.split(","),
        default="resnet50,B/16,L/16,H/14" if ON_GPU else "resnet50,B/16",
        help=f"some of {', '.join(RESNETS)}, and a ViT's size/patch as B/16 (here %(default)s)",
    )
    add(
        "--rungs",
        type=lambda text: text.split(","),
        default=here,
        help=f"some of {','.join(RUNGS)} (here {','.join(here)})",
    )
    add("--image_sizes", type=integers, default="224,176", help="pixels (%(default)s)")
    add("--batch_sizes", type=integers, default=sizes, help="images per step, rising (here %(default)s)")
    add("--steps", type=int, default=steps, help="measured steps of each case (here %(default)s)")
    add("--warmup_steps", type=int, default=steps // 3, help="steps before these, not measured (here %(default)s)")
    add(
        "--seconds_limit",
        type=float,
        default=3600,
        help="start no case after these; the rest is recorded as left out",
    )
    add("--profile", type=Path, help="file for the trace of one step of the last case, whose table is printed")
    arguments = parser.parse_args()
    unknown = set(arguments.rungs) - set(RUNGS)
    if unknown:
        parser.error(f"--rungs {unknown.pop()} is unknown. Known: {', '.join(RUNGS)}.")
    known = [*RESNETS, *(f"{size}/{patch}" for size in SIZES for patch in (14, 16, 28, 32))]
    unknown = set(arguments.models) - set(known)
    if unknown:
        parser.error(f"--models {unknown.pop()} is unknown. Known: {', '.join(known)}.")
    rows = sweep(arguments)
    print(table(rows))
    print(write("throughput", rows, amp=str(HALF).removeprefix("torch."), steps=arguments.steps))


if __name__ == "__main__":
    main()
