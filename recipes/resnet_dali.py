# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18", "simplejpeg>=1.8",
#   "nvidia-dali-cuda130>=2.4; sys_platform == 'linux'",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a ResNet on images that NVIDIA DALI decodes and resizes: on the GPU, or with its threads on a CPU.

Base: resnet.py. Changes: Dali, build_loaders, intact.

    python recipes/resnet_dali.py                                             # a laptop
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_dali.py --data FOLDER                                   # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_dali.py --data FOLDER                 # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_dali.py --data FOLDER                                  # on each of four nodes, R = 0 to 3

DALI gets each batch's images in the order of resnet.py, from any storage, with the same crops; the position is the
checkpoint's step. On a CPU an image's pixels differ from resnet.py's by less than 0.5 of 255 in the mean, or 5 where
resnet.py decodes at a reduced size. All but intact, plain JPEGs go to its decoder, which names undecodable images.

Longer than 250 lines: DALI would not notice a damaged image, so the recipe keeps such images from it.

When: the GPU's decoders are idle and the CPU has few cores. Without a GPU it does not pay: 465 images/s per core at
224 px, DALI with its own reader 497, resnet.py 1,165 (2 CPU cores, benchmarks/results/loaders_cpu2_2026-11-29.json).
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError, say
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.decode import plain_jpeg, render, scaled, segments
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.run import Run

FED = ("jpegs", "starts", "ends")  # each image's bytes, and (top, left) and (bottom, right) of its crop
# A marker that cannot occur in compressed data: something else was written over a part of the file.
STRAY = re.compile(rb"\xff[^\x00\xff\xc4\xd0-\xd7\xd9-\xdb\xdd\xfe]")
MODELS = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: MODELS = HfArg(default="resnet18", help="the network, by torchvision's name")
    norm: Literal["batch", "group"] = HfArg(default="batch", help="group: the same statistics on any topology")
    sync_batch_norm: bool = HfArg(default=False, help="share batch norm's statistics among the GPUs")
    epochs: Positive = HfArg(default=10, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=0.1, help="peak learning rate, at the end of the warmup")
    schedule: Literal["one_cycle", "cosine"] = HfArg(default="one_cycle", help="shape of the learning rate curve")
    warmup_epochs: NonNegative = HfArg(default=3.0, help="epochs in which the learning rate rises")
    momentum: Fraction = HfArg(default=0.9, help="Nesterov momentum of SGD")
    weight_decay: NonNegative = HfArg(default=5e-4, help="L2 penalty; norms and biases have none")
    max_grad_norm: NonNegative = HfArg(default=0.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    channels_last: bool = HfArg(default=False, help="NHWC layout in memory: for tensor cores")
    compile: bool = HfArg(default=False, help="torch.compile the model")


def intact(image: bytes) -> bool:
    """Return whether a JPEG may be decoded in part: it has its end, and no other file's bytes in its data."""
    begin = max((end for *_, end in segments(image)), default=2)
    return image.endswith(b"\xff\xd9") and not STRAY.search(image, begin)


class Dali:
    """Batches of the views, decoded by a DALI pipeline; the next one is made while the current one trains."""

    def __init__(self, views, num_threads, device):
        self.views, self.num_threads, self.device = views, max(1, num_threads), device
        self.deferred, self.pipeline, self.decoder = [], None, "DALI"
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def __iter__(self):
        coming = None
        with ThreadPoolExecutor(1) as thread:
            for samples in self.views.order:
                batch, coming = coming, thread.submit(self.batch, samples)
                if batch:
                    yield batch.result()
            yield coming.result()

    def batch(self, samples):
        """Make a batch: the JPEGs' pixels by DALI, all else by the views themselves."""
        self.deferred = []
        batch = replace(self.views, render=self.defer).__getitems__(samples)
        if not self.deferred:
            return batch
        rows, *fed = zip(*self.deferred, strict=True)
        self.pipeline = self.pipeline or self.build(len(samples), self.views.image_size)
        if self.copied:
            self.copied.synchronize()  # DALI is about to overwrite its last output
        try:
            (pixels,) = self.pipeline.run(**dict(zip(FED, map(list, fed), strict=True)))
        except RuntimeError as error:  # one bad image ends a pipeline: our decoder finds out which one
            self.pipeline = None
            say(f"DALI failed, so this batch is decoded without it: {error}", sys.stderr)
            return self.views.__getitems__(samples)
        images = batch.images.to(self.device)
        images[torch.tensor(rows, device=self.device)] = torch.from_dlpack(pixels.as_tensor())
        if self.copied:
            self.copied.record(torch.cuda.current_stream(self.device))
        return batch._replace(images=images)

    def defer(self, image, view, seed, out):
        """Queue a plain JPEG and its crop's edges for DALI, or render another image; return whether it is mirrored."""
        # DALI decodes no further than the crop, and would not notice a truncated image.
        size = plain_jpeg(image) if isinstance(image, bytes) and intact(image) else None
        if size is None:
            return render(image, view, seed, out)
        crop, _ = scaled(view(*size[::-1], seed), out.shape[0], *size[::-1])
        edges = (np.array(edge, np.int32) for edge in ((crop.top, crop.left), (crop.bottom, crop.right)))
        self.deferred.append((out.storage_offset() // out.numel(), np.frombuffer(image, np.uint8), *edges))
        return crop.mirrored

    def build(self, batch_size, size):
        """Build a pipeline: encoded images and edges of crops in, pixels out."""
        from nvidia.dali import Pipeline, fn, types

        device_id, decoder = (self.device.index or 0, "mixed") if self.copied else (None, "cpu")
        pipeline = Pipeline(batch_size, self.num_threads, device_id, exec_pipelined=False, exec_async=False)
        with pipeline:
            jpegs, starts, ends = (fn.external_source(name=name, ndim=1) for name in FED)
            options = {"axes": [0, 1], "device": decoder, "output_type": types.RGB, "adjust_orientation": False}
            crops = fn.decoders.image_slice(jpegs, start=starts, end=ends, **options)
            # A triangular filter where the crop shrinks, as in the other recipes: without it accuracy is lost.
            pipeline.set_outputs(fn.resize(crops, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True))
        return pipeline


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers, layout, read=Dali) for each in views]


def build_model(images, config, num_classes, seed):
    """Return torchvision's network; residual branches start at zero (Goyal et al., arXiv:1706.02677, section 5.1)."""
    # Group norm with 32 groups: Wu & He, arXiv:1803.08494.
    norm_layer = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    model = models.get_model(config.model, num_classes=num_classes, norm_layer=norm_layer, zero_init_residual=True)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if config.sync_batch_norm else model


def build_optimizer(model, config, steps_per_epoch):
    """Return SGD with Nesterov momentum and its learning rate scheduler, which counts global steps."""
    groups, nesterov = parameter_groups(model, config.weight_decay), config.momentum > 0
    # fused: one pass over weights, gradients and momenta instead of one for each operation.
    optimizer = torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return zero_momentum(optimizer), build_scheduler(optimizer, config.schedule, steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision and data parallelism of the YAML with `accelerator.prepare`."""
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        model.compile()
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            logits = model(batch.images)
            loss = cross_entropy(logits.float(), batch.labels, label_smoothing=config.label_smoothing, reduction="sum")
            loss = loss / batch.step_weight  # this process's share of the step's loss
            run.observe(batch, loss)
            # parts undoes averaging; the last factor, 1 or nan, shows every process a loss that is not finite.
            accelerator.backward(loss * batch.parts * (1 + 0 * loss.detach()))
            if accelerator.sync_gradients:
                grad_norm = clip_grad_norm(accelerator, model, config.max_grad_norm)
                if not run.skips(grad_norm):  # --on_nonfinite skip decides here, and waits for the device
                    optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.check_finite()  # --on_nonfinite stop ends the run here if the step before was not finite
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            run.profiler.step()
            scheduler.step()
            if run.checkpoint_due:
                run.save(model, optimizer, scheduler)
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    """Log top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.images), batch.labels, batch.valid)
            run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))


def check(run_config, images, config, launch):
    """Raise UserError for settings that cannot work, before the processes connect."""
    if config.sync_batch_norm and (not launch.on_gpu or config.norm != "batch"):
        raise UserError("--sync_batch_norm needs GPUs and --norm batch. Leave it out; --norm group needs no sync.")
    if images.image_size <= 16 and launch.precision == "bf16" and not launch.on_gpu:  # layer4 sees 1 x 1 pixels
        raise UserError("bf16 gradients of such small images are wrong on CPUs (oneDNN 3.13). Give --image_size 32.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        model = build_model(images, config, len(classes), run_config.seed)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        model, optimizer = parallelize(accelerator, model, optimizer, config)
        settle_buckets(model, train_loader.sample())
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run)
                run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, ImageConfig, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))
