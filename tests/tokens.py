# SPDX-License-Identifier: Apache-2.0
"""A second modality, as small as one can be: predict a token from its own number, in sequences of unequal length.

Started by test_tokens.py through the same loop, Run, order and checkpoints as the recipes. `--loss means` takes the
usual mean over each micro-batch's tokens, whose mean over micro-batches is not the step's. `--die_at N` kills the
process after step N, once.
"""

import dataclasses
import os
import signal
import time
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.collectives import all_reduce_sum, data_parallel
from shared.config import NonNegative, Positive, RunConfig, parse
from shared.contracts import Description
from shared.draws import augmentation_seed, digest, random_bits
from shared.metrics import IGNORED, Metric
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.order import EvaluationOrder, TrainingOrder, micro_batch_size
from shared.run import Run

VOCABULARY, LENGTH = 32, 16
NATS = Metric("nats_per_token", higher_is_better=False)


@dataclass
class TokenConfig:
    """The sequences; a part of them has no counted token at all."""

    sequences: Positive = HfArg(default=64, help="in the corpus, of which the first have no counted token")
    empty: Positive = HfArg(default=2, help="sequences without a counted token")

    def identity(self) -> dict:
        return dataclasses.asdict(self)


@dataclass
class Config:
    epochs: Positive = HfArg(default=4, help="passes over the sequences")
    global_batch_size: Positive = HfArg(default=16, help="sequences per step")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=0.05, help="greatest learning rate")
    warmup_epochs: NonNegative = HfArg(default=0.0, help="epochs of rising learning rate")
    max_grad_norm: NonNegative = HfArg(default=1.0, help="clip the gradient's norm to this")
    loss: Literal["sum", "means"] = HfArg(default="sum", help="over the step's tokens, or means of means")


class Batch(NamedTuple):
    """One micro-batch (contracts.py) of B sequences: tokens and labels are (B, LENGTH) int64."""

    tokens: Tensor
    labels: Tensor
    indices: Tensor
    seeds: Tensor
    digest: int
    step_weight: float
    parts: int
    rejected: tuple = ()
    wait_seconds: float = 0.0


class TokenLoader:
    """Batches of a corpus in memory."""

    rejects = "rejected"

    def __init__(self, tokens: Tensor, labels: Tensor, order: TrainingOrder | EvaluationOrder, seed: int):
        self.tokens, self.labels, self.order, self.seed, self.noted = tokens, labels, order, seed, str

    def starting_at(self, step: int) -> "TokenLoader":
        self.order.step = step
        return self

    def __iter__(self):
        training = isinstance(self.order, TrainingOrder)
        for number, samples in enumerate(self.order):
            indices = torch.tensor([index for _, index in samples])
            seeds = [augmentation_seed(self.seed, *sample) for sample in samples]
            labels = torch.where((indices < 0)[:, None], IGNORED, self.labels[indices])
            step = self.order.step + number * samples_of(self.order) // self.order.global_batch_size if training else 0
            yield Batch(
                self.tokens[indices],
                labels,
                indices,
                torch.tensor(np.array(seeds, dtype=np.uint64).view(np.int64)),
                digest(indices.tolist(), seeds),
                self.order.step_weight(step) if training else 0.0,
                self.order.parts if training else 1,
            )

    def describe(self) -> Description:
        counted = int((self.labels != IGNORED).sum())
        said = f"{len(self.tokens)} sequences, {counted} counted tokens"
        name = f"{random_bits(1, int(self.labels.sum()))[0]:x}"
        return Description("sequences", len(self.tokens), name, said, (f"sequences of {LENGTH} tokens",), {}, {})

    def check_rejected(self, rejected: int, samples: int) -> None:
        assert not rejected


def samples_of(order: TrainingOrder) -> int:
    """Sequences of a micro-batch on all processes."""
    return order.micro_batch_size * order.global_batch_size // order.share


def build_loaders(accelerator, run_config, data, config):
    bits = random_bits(data.sequences * (2 * LENGTH + 1), run_config.seed, 1).reshape(data.sequences, -1)
    tokens = torch.tensor((bits[:, :LENGTH] % VOCABULARY).astype(np.int64))
    labels = (tokens * 7 + torch.tensor((bits[:, LENGTH:-1] % 2).astype(np.int64))) % VOCABULARY
    lengths = torch.tensor((bits[:, -1] % LENGTH).astype(np.int64)) + 1
    lengths[: data.empty] = 0
    labels[torch.arange(LENGTH) >= lengths[:, None]] = IGNORED
    batch, share = config.global_batch_size, data_parallel(accelerator)
    micro = micro_batch_size(config, share[1])
    order = TrainingOrder(len(tokens), batch, micro, *share, run_config.seed, weights=lengths.numpy())
    held_out = EvaluationOrder(len(tokens), micro, *share)
    return [TokenLoader(tokens, labels, each, run_config.seed) for each in (order, held_out)]


def loss_of(logits, batch, config):
    """This process's share of the step's loss."""
    if config.loss == "sum":
        loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
        return loss / batch.step_weight
    counted = (batch.labels != IGNORED).sum().clamp(min=1)
    loss = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss / counted / batch.parts


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            loss = loss_of(model(batch.tokens), batch, config)
            run.observe(batch, loss)
            accelerator.backward(loss * batch.parts * (1 + 0 * loss.detach()))
            if accelerator.sync_gradients:
                grad_norm = clip_grad_norm(accelerator, model, config.max_grad_norm)
                if not run.skips(grad_norm):
                    optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.check_finite()
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            scheduler.step()
            if run.checkpoint_due:
                run.save(model, optimizer, scheduler)
            if os.environ.get("TOKENS_DIE_AT") == str(run.step) and run.checkpoint is None:
                time.sleep(1)  # the others write their parts
                os.kill(os.getpid(), signal.SIGKILL)
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    model.eval()
    with torch.no_grad():
        sums = [0.0, 0]
        for batch in loader:
            logits = model(batch.tokens).flatten(0, 1)
            sums[0] += cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
            sums[1] += int((batch.labels != IGNORED).sum())
    total, count = all_reduce_sum(accelerator, sums)
    run.log_evaluation({NATS.name: total / count, "eval_loss": total / count, "eval_samples": len(loader.tokens)})


def main(run_config, data, config):
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, data, config)
    run = Run(accelerator, run_config, data, config, train_loader, eval_loader, NATS)
    if not run.finished:
        model = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), config.learning_rate)
        scheduler = build_scheduler(optimizer, "cosine", run.total_steps, 0)
        model, optimizer = accelerator.prepare(model, optimizer)
        settle_buckets(model, train_loader.tokens[:1])
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        while not run.stopping:
            train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
            if run.evaluation_due:
                evaluate(accelerator, model, eval_loader, run)
            run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*parse(RunConfig, TokenConfig, Config))
