# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "filelock>=3.12", "tqdm>=4.66",
#   "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Pack short documents into blocks of one length, without letting them see each other: less padding, the same loss.

Base: llm.py. Changes: SummedLoss, Blocks, pack, build_loaders.

    python recipes/llm_packing.py --data docstrings                           # a laptop
    L="accelerate launch --config_file accelerate_configs"
    $L/local_ddp.yaml recipes/llm_packing.py                                  # one GPU, or the CPU without one
    $L/local_fsdp.yaml --num_processes 8 recipes/llm_packing.py --model 1B    # a node; or local_zero1, zero2, zero3
    $L/local_hsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \\
        --num_processes 32 --parallelism_config_dp_replicate_size 4 recipes/llm_packing.py --model 8B  # on four nodes

A block is a sample: its documents stay together, and the order shuffles the blocks. Attention and positions begin
again with each document, by a mask that the device makes from the positions: transformers' own search for packed
documents would wait for the device in each step.

Longer than 250 lines: packing needs the plan, its batches and the mask beside all that llm.py has.

When: most documents are shorter than --sequence_length. Measured on the standard library's docstrings, 2 CPU cores,
three epochs, three seeds: 483 steps of 5 blocks, 99 % full, take 28 s (18 to 29), and 480 steps of 16 sequences of
llm.py, 31 % full, 70 s (56 to 70); both end at 1.98 to 1.99 bits per byte, medians
(benchmarks/results/packing_cpu2_2026-12-01.json).
"""

import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.hf_argparser import HfArg
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import NonNegative, Positive, RunConfig, parse
from shared.errors import UserError, say
from shared.launch import rank, this_launch
from shared.metrics import IGNORED
from shared.models.weights import dropout, find_pretrained, init_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run
from shared.text import BITS_PER_BYTE, Evaluation, Loader, TextConfig, build_sequences, open_corpus
from shared.text.loader import Sequences
from shared.text.tokenizer import pretrained_tokenizer

STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")
# name: width, blocks, heads, key-value heads, MLP width. demo: ours; the others: Grattafiori et al., arXiv:2407.21783.
SIZES = {"demo": (128, 2, 4, 4, 384), "1B": (2048, 16, 32, 8, 8192), "8B": (4096, 32, 32, 8, 14336)}
CHUNK = 2048  # tokens whose logits exist at once


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the demonstration on Python's help."""

    model: Literal["demo", "1B", "8B"] = HfArg(default="demo", help="size, after Llama 3")
    pretrained: str = HfArg(default="", help="folder or hub id to fine-tune; it decides network and tokenizer")
    epochs: Positive = HfArg(default=8, help="passes over the training sequences")
    global_batch_size: Positive = HfArg(default=16, help="sequences per step, over all processes and accumulation")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=3e-3, help="peak learning rate, at the end of the warmup")
    warmup_epochs: NonNegative = HfArg(default=0.5, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: NonNegative = HfArg(default=0.1, help="AdamW's; norms have none")
    max_grad_norm: NonNegative = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    activation_checkpointing: bool = HfArg(default=False, help="recompute each block in the backward: less memory")
    compile: bool = HfArg(default=False, help="torch.compile each block")


class SummedLoss:
    """Part of a network's class: its forward returns the summed loss of the tokens whose label counts. The logits of
    CHUNK tokens exist at a time, computed again in the backward: those of all may take more memory than the rest."""

    def forward(self, tokens, labels=None, positions=None):
        """tokens, labels: (B, S) int64. positions: (B, S), each token's place in its document; None: in its row."""
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        if positions is not None:
            document = (positions == 0).cumsum(1)
            same = document[:, :, None] == document[:, None, :]
            inputs["attention_mask"] = same.tril()[:, None]  # (B, 1, S, S): a token sees its own document so far
        states = self.get_decoder()(**inputs).last_hidden_state
        labels = tokens if labels is None else labels  # settle_buckets and check_head give tokens alone
        total = torch.zeros((), device=tokens.device)
        for part, those in zip(states.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True):
            total = total + checkpoint(self._chunk, part, those, use_reentrant=False, preserve_rng_state=False)
        return total

    def _chunk(self, states, labels):
        logits = self.get_output_embeddings()(states)
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True)
class Blocks(Sequences):
    """Sequences of which each holds several pieces, one after the other."""

    members: tuple[list[int], ...] = ()  # of each block: numbers of pieces

    def __len__(self):
        return len(self.members)

    def __getitems__(self, samples):
        batch = super().__getitems__(samples)
        positions = torch.arange(self.length).repeat(len(samples), 1)
        for row, (_, index) in enumerate(samples):
            begin = 0
            for piece in self.members[index] if index >= 0 else ():
                positions[row, begin:] = torch.arange(self.length - begin)
                begin += int(self.pieces[piece, 1])
            positions[row, begin:] = torch.arange(self.length - begin)  # padding, a document of its own
        return batch._replace(positions=positions)

    def fill(self, index, tokens, labels):
        """Write a block's inputs and labels to two rows (S,)."""
        begin = 0
        for piece in self.members[index]:
            super().fill(piece, tokens[begin:], labels[begin:])
            begin += int(self.pieces[piece, 1])


def pack(sequences):
    """Return blocks of the sequences' pieces: the longest first, each into the fullest block that has room (best-fit
    decreasing; Johnson, 1973). It is a function of their lengths alone: the same on every process."""
    longest, lengths, members = sequences.length, sequences.pieces[:, 1], []
    rooms = [[] for _ in range(longest + 1)]  # by free tokens: blocks
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        room = next((free for free in range(size, longest) if rooms[free]), longest)
        if not rooms[room]:
            rooms[room].append(len(members))
            members.append([])
        block = rooms[room].pop()
        members[block].append(piece)
        rooms[room - size].append(block)
    counted = np.array([sequences.counted[each].sum() for each in members])
    fill = lengths.sum() / longest
    note = f"packed into {len(members):,} blocks, {fill / len(members):.1%} full; unpacked: {fill / len(lengths):.1%}"
    values = vars(sequences) | {"counted": counted, "notes": (*sequences.notes, note)}
    return Blocks(**values, members=tuple(members))


def build_loaders(accelerator, run_config, text, config):
    """Return the training and evaluation loaders of this process's share; sequences depend on seed and step alone."""
    tokenizer = pretrained_tokenizer(find_pretrained(config.pretrained)) if config.pretrained else None
    corpora = open_corpus(text.data, text.val_fraction)
    views = build_sequences(accelerator, run_config, text, config, corpora, tokenizer, pack)
    return [Loader(each, accelerator.device, run_config.num_workers) for each in views]


def build_model(text, config, vocabulary, seed):
    """Return the whole network on the CPU, pretrained or with weights that depend on seed and parameter name alone."""
    unset_hf_deepspeed_config()  # or transformers would make the network in ZeRO-3's shards, before it is filled
    options = {"attn_implementation": "sdpa", "dtype": torch.float32}
    sizes = network(text, config, vocabulary)
    pretrained = config.pretrained and torch.get_default_device().type != "meta"
    if pretrained:
        try:
            model = AutoModelForCausalLM.from_pretrained(find_pretrained(config.pretrained), config=sizes, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"--pretrained {config.pretrained} cannot be loaded: {error} Give another.") from error
    else:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(sizes, **options)
        model.tie_weights()  # which no_init_weights leaves out
        init_weights(model, seed)
    kind = type(model)
    model.__class__ = type(kind.__name__, (SummedLoss, kind), {})
    if pretrained:
        check_head(kind, model, config)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    return model


def check_head(kind, model, config):
    """Raise UserError where transformers' forward changes the head's logits, by a scale or a cap: ours does not."""
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        logits = kind.forward(model.eval(), tokens, use_cache=False).logits
        ours, theirs = model(tokens), cross_entropy(logits[0].float(), tokens[0], reduction="sum")
    if not torch.isclose(ours, theirs, rtol=1e-3):
        raise UserError(f"--pretrained {config.pretrained} scales or caps its logits. Give another network.")


def network(text, config, vocabulary):
    """Return transformers' configuration of the network, without dropout."""
    if config.pretrained:
        sizes = AutoConfig.from_pretrained(find_pretrained(config.pretrained))
        if vocabulary > sizes.vocab_size:
            what = f"the tokenizer of --pretrained {config.pretrained} has {vocabulary} tokens"
            raise UserError(f"{what}, its network {sizes.vocab_size}. Give a folder where the two belong together.")
        sizes.update(dict.fromkeys(dropout(sizes), 0.0))  # drawn by each process, and again in a recomputed block
        return sizes
    width, blocks, heads, groups, mlp_width = SIZES[config.model]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=blocks, intermediate_size=mlp_width,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=text.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, tie_word_embeddings=config.model != "8B",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def build_optimizer(model, config, steps_per_epoch):
    """Return AdamW and its learning rate scheduler, which counts global steps."""
    groups = parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, config.learning_rate, betas=(0.9, 0.95), fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision, replicas and shards of the YAML with `accelerator.prepare`."""
    if config.compile:
        for block in max((each for each in model.modules() if isinstance(each, torch.nn.ModuleList)), key=len):
            block.compile()
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and plugin.mixed_precision_policy:  # accelerate 1.15 would round the loss to 16 bits
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    return accelerator.prepare(model, optimizer)


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            loss = model(batch.tokens, batch.labels, batch.positions)
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
    """Log bits per byte, perplexity and loss over the held-out documents, each token counted once."""
    model.eval()
    evaluation = Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.tokens, batch.labels, batch.positions), batch.labels)
            run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset), loader.dataset.byte_count))


def check(run_config, text, config, launch):
    """Raise UserError for a pretrained network that is missing or too small, before the processes meet."""
    if not config.pretrained:
        return
    folder = find_pretrained(config.pretrained)
    network(text, config, pretrained_tokenizer(folder).size)
    sizes = AutoConfig.from_pretrained(folder)
    if text.sequence_length > (most := getattr(sizes, "max_position_embeddings", text.sequence_length)):
        what = f"--sequence_length {text.sequence_length} is more than the {most} positions of --pretrained"
        raise UserError(f"{what} {config.pretrained}. Give {most} or less.")
    if (rates := dropout(sizes)) and rank() == 0:
        say(f"--pretrained {config.pretrained} has {', '.join(rates)}: trained here without", sys.stderr)


def main(run_config, text, config):
    check(run_config, text, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config, STRATEGIES)
    train_loader, eval_loader = build_loaders(accelerator, run_config, text, config)
    vocabulary, steps_per_epoch = train_loader.dataset.tokenizer.size, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, text, config, train_loader, eval_loader, BITS_PER_BYTE)
    if not run.finished:
        model = build_model(text, config, vocabulary, run_config.seed)
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


CONFIGS = (RunConfig, TextConfig, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))
