# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Give each GPU some consecutive blocks of a Vision Transformer: pipeline parallelism, with data parallelism.

Base: vit.py. Changes: Stage, MeasuredStage, stage_table, parallelize, step, last, add_up, clip_grad_norm,
train_one_epoch, evaluate, check, main.
Longer than 250 lines: a stage that measures itself is part of the lesson.

    L="accelerate launch --config_file accelerate_configs/local_pp.yaml"
    $L recipes/vit_pp.py                                            # two stages, one a process
    $L --num_processes 8 recipes/vit_pp.py --model L --pipeline_parallel_size 4       # a node: 4 stages x 2 replicas
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 16 \
        recipes/vit_pp.py --model G --pipeline_parallel_size 4                        # on each of four nodes

When: GPUs are far apart: only activations at the cuts are sent. In a step of m chunks p stages idle for
(p - 1) / (m + p - 1) of the time, and keep the activations of m chunks (GPipe) or at most p (1F1B); the run ends by
printing both, measured. ViT-B in 4 stages: 336 MiB of 1,321 (benchmarks/results/memory_cpu2_2026-11-26.json).
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parameters_to_vector, vector_to_parameters
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.vit import (
    Rate,
    VisionTransformer,
    load_pretrained,
    network_sizes,
    pixel_statistics,
    run_blocks,
    vit_config,
)
from shared.models.weights import find_pretrained, init_weights
from shared.optim import build_scheduler, parameter_groups
from shared.run import Run


@dataclass
class Images(ImageConfig):
    """The shared settings, with larger training crops."""

    min_crop_area: Part = HfArg(default=0.8, help="least share of an image in a training crop; ImageNet: 0.05")


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: Literal["demo", "Ti", "S", "B", "L", "H", "g", "G"] = HfArg(default="demo", help="size; G: 2 billion")
    patch_size: Positive = HfArg(default=8, help="side of a patch, pixels; ImageNet: 16, or 14 from H on")
    pretrained: str = HfArg(default="", help="folder or hub id to fine-tune; it decides model and patch size")
    epochs: Positive = HfArg(default=60, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=2e-3, help="peak learning rate, at the end of the warmup")
    warmup_epochs: NonNegative = HfArg(default=5.0, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: NonNegative = HfArg(default=0.1, help="AdamW's; norms, biases, class token and positions have none")
    max_grad_norm: NonNegative = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    drop_path: Rate = HfArg(default=0.0, help="share of branches skipped in the last block; rises linearly to it")
    activation_checkpointing: bool = HfArg(default=False, help="recompute each block in the backward: less memory")
    pipeline_parallel_size: Positive = HfArg(default=2, help="stages, one per process")
    pipeline_schedule: Literal["gpipe", "1f1b"] = HfArg(
        default="1f1b", help="order of the chunks' forward and backward"
    )
    pipeline_chunks: Positive = HfArg(default=8, help="parts of a batch, which pass through the stages one by one")


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    statistics = pixel_statistics(find_pretrained(config.pretrained)) if config.pretrained else None
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers, statistics=statistics) for each in views]


def build_model(images, config, num_classes, seed):
    """Return the whole network on the CPU, pretrained or with weights that depend on seed and parameter name alone."""
    if config.pretrained:
        folder = find_pretrained(config.pretrained)
        model = load_pretrained(folder, images.image_size, num_classes, config.drop_path, seed)
    else:
        sizes = vit_config(config.model, images.image_size, config.patch_size, num_classes, config.drop_path)
        with torch.device("meta"):
            model = VisionTransformer(sizes)
        init_weights(model.to_empty(device=torch.get_default_device()), seed)
    for block in model.vit.layers:
        block.recompute = config.activation_checkpointing
    return model


def build_optimizer(model, config, steps_per_epoch):
    """Return AdamW and its learning rate scheduler, which counts global steps."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    # fused: one pass over weights, gradients and both moments instead of one for each operation.
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


class Stage(nn.Module):
    """The consecutive blocks of one pipeline stage, under the whole network's parameter names."""

    def __init__(self, model: VisionTransformer, number: int, stages: int):
        super().__init__()
        blocks = len(model.vit.layers)
        self.config = model.config
        mine = range(blocks * number // stages, blocks * (number + 1) // stages)
        self.vit = nn.Module()
        self.vit.embeddings = model.vit.embeddings if number == 0 else None
        self.vit.layers = nn.ModuleDict({str(block): model.vit.layers[block] for block in mine})
        self.vit.layernorm = model.vit.layernorm if number == stages - 1 else None
        self.classifier = model.classifier if number == stages - 1 else None

    def forward(self, x: Tensor, sample_seeds: Tensor | None = None) -> Tensor:
        """Map images (B, 3, H, W) or the previous stage's output (B, tokens, width) to the next stage's input or to
        logits."""
        x = x if self.vit.embeddings is None else self.vit.embeddings(x)
        x = run_blocks(self, ((int(name), block) for name, block in self.vit.layers.items()), x, sample_seeds)
        return x if self.classifier is None else self.classifier(self.vit.layernorm(x)[:, 0])


class MeasuredStage(PipelineStage):
    """torch's stage; while `measuring`, it sums the seconds it computes and the bytes it keeps for the backward."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.measuring, self.waiting, self.chunk_bytes = False, 0, 0
        self.busy, self.most_waiting, self.idle = 0.0, 0, 0.0

    @contextlib.contextmanager
    def measure(self, wanted: bool) -> Iterator[None]:
        """Measure the call of the schedule in the `with` block, if wanted."""
        self.measuring, self.busy, self.most_waiting, begin = wanted, 0.0, 0, time.perf_counter()
        yield
        if wanted:
            self.measuring = False
            self.idle = 1 - self.busy / (time.perf_counter() - begin)

    def forward_one_chunk(self, *arguments, **keywords):
        if not (self.measuring and torch.is_grad_enabled()):
            return super().forward_one_chunk(*arguments, **keywords)
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.submod.parameters()}
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = self._timed(super().forward_one_chunk, arguments, keywords)
        self.chunk_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        return result

    def backward_one_chunk(self, *arguments, **keywords):
        if not self.measuring:
            return super().backward_one_chunk(*arguments, **keywords)
        self.waiting -= 1
        return self._timed(super().backward_one_chunk, arguments, keywords)

    def _timed(self, function, arguments, keywords):
        begin = time.perf_counter()
        result = function(*arguments, **keywords)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.busy += time.perf_counter() - begin
        return result


def stage_table(accelerator: Accelerator, stage: MeasuredStage, schedule: str, chunks: int) -> str:
    """Return a line for each stage of the first replica, measured and in theory; every process must call it.

    Theory: stage s of p idles (p - 1) / (m + p - 1) of a step of m chunks (Huang et al., arXiv:1811.06965), and keeps
    the activations of m chunks under gpipe, of min(m, p - s) under 1f1b (Narayanan et al., arXiv:2104.04473).
    """
    stages, number = stage.num_stages, stage.stage_index
    waiting = chunks if schedule == "gpipe" else min(chunks, stages - number)
    mine = {
        "parameters": sum(parameter.numel() for parameter in stage.submod.parameters()),
        "idle": stage.idle,
        "kept_bytes": stage.most_waiting * stage.chunk_bytes,
        "theory_bytes": waiting * stage.chunk_bytes,
    }
    rows = [None] * stages
    torch.distributed.all_gather_object(rows, mine, group=accelerator.mesh["pp"].get_group())
    bubble = (stages - 1) / (chunks + stages - 1)
    lines = ["stage  parameters  idle (theory)    activations kept, MiB (theory)"]
    lines += [
        f"{index:5}  {row['parameters']:10,}  {row['idle']:5.1%} ({bubble:.1%})   "
        f"{row['kept_bytes'] / 2**20:17.1f} ({row['theory_bytes'] / 2**20:.1f})"
        for index, row in enumerate(rows)
    ]
    return "\n".join(lines)


def parallelize(accelerator, model, config):
    """Return this process's part of the network, its stage, and the schedule that runs it."""
    stages, number = config.pipeline_parallel_size, accelerator.mesh.get_local_rank("pp")
    part = Stage(model, number, stages).to(accelerator.device)
    part.forward = accelerator.autocast()(part.forward)

    def loss(logits, labels):
        """Return the chunk's share of the step's loss: losses and gradients add up over chunks and replicas."""
        total = cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing, reduction="sum")
        share = total / config.global_batch_size
        return share * (1 + 0 * share.detach())  # the factor, 1 or nan, shows every process a loss that is not finite

    stage = MeasuredStage(part, number, stages, accelerator.device, group=accelerator.mesh["pp"].get_group())
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[config.pipeline_schedule]
    return part, stage, schedule(stage, config.pipeline_chunks, loss, scale_grads=False)


def step(accelerator, stage, schedule, batch):
    """Run forward and backward of all chunks of one batch; return its share of the step's loss, on every stage."""
    images = (batch.images,) if stage.is_first else ()
    target, losses = (batch.labels, []) if stage.is_last else (None, None)
    schedule.step(*images, target=target, losses=losses, return_outputs=False, sample_seeds=batch.seeds)
    total = sum(losses).detach() if losses else torch.zeros((), device=accelerator.device)
    return last(accelerator, total)


def last(accelerator, tensor):
    """Overwrite the tensor on every stage with the last stage's, and return it."""
    group = accelerator.mesh["pp"].get_group()
    distributed.broadcast(tensor, group_src=group.size() - 1, group=group)
    return tensor


def add_up(accelerator, model):
    """Sum the gradients over a stage's replicas, in one message: DDP's hooks do not allow GPipe's many forwards."""
    gradients = [parameter.grad for parameter in model.parameters()]
    distributed.all_reduce(total := parameters_to_vector(gradients), group=accelerator.mesh["dp"].get_group())
    vector_to_parameters(total, gradients)


def clip_grad_norm(accelerator, model, max_norm):
    """Clip the gradients by their norm over all stages; return the norm."""
    square = get_total_norm([parameter.grad for parameter in model.parameters()]) ** 2
    distributed.all_reduce(square, group=accelerator.mesh["pp"].get_group())
    clip_grads_with_norm_(model.parameters(), max_norm, square.sqrt())
    return square.sqrt()


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run, stage, schedule):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate():
            with stage.measure(run.will_log):
                loss = step(accelerator, stage, schedule, batch)
            run.observe(batch, loss)
            if accelerator.sync_gradients:
                add_up(accelerator, model)
                grad_norm = clip_grad_norm(accelerator, model, config.max_grad_norm or float("inf"))
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


def evaluate(accelerator, model, loader, run, stage, schedule):
    """Log top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    shape = loader.order.micro_batch_size, len(loader.dataset.source.classes)
    for batch in loader:
        images, target = ((batch.images,) if stage.is_first else ()), (batch.labels if stage.is_last else None)
        logits = schedule.eval(*images, target=target)
        logits = logits.float() if stage.is_last else torch.empty(shape, device=accelerator.device)
        evaluation.add(last(accelerator, logits), batch.labels, batch.valid)
        run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))


def check(run_config, images, config, launch):
    """Raise UserError for a network that is missing or cannot be cut, before the processes connect."""
    blocks, stages, chunks = network_sizes(images, config)[0], config.pipeline_parallel_size, config.pipeline_chunks
    if stages > blocks:
        raise UserError(f"--pipeline_parallel_size {stages} exceeds the {blocks} blocks. Give {blocks} or less.")
    if config.pipeline_schedule == "1f1b" and chunks < stages:
        raise UserError(f"--pipeline_chunks {chunks} is less than the {stages} stages. Give {stages} or more.")
    batch = config.global_batch_size * stages // launch.processes // config.gradient_accumulation_steps
    if batch % chunks:
        raise UserError(f"--pipeline_chunks {chunks} do not divide a stage's batch of {batch}. Give a divisor of it.")
    if launch.precision == "fp16":
        raise UserError("fp16's loss scale is not shared among stages. Set mixed_precision to bf16 or no.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        model = build_model(images, config, len(classes), run_config.seed)
        model, stage, schedule = parallelize(accelerator, model, config)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        optimizer = accelerator.prepare_optimizer(optimizer)
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run, stage, schedule)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run, stage, schedule)
                run.save(model, optimizer, scheduler)
        run.say(stage_table(accelerator, stage, config.pipeline_schedule, config.pipeline_chunks))
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, Images, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))
