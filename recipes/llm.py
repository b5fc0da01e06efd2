# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "filelock>=3.12", "tqdm>=4.66",
#   "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a causal language model in which every token weighs the same, on any number of processes.

Base: none.

    python recipes/llm.py                                                     # a laptop
    L="accelerate launch --config_file accelerate_configs"
    $L/local_ddp.yaml recipes/llm.py                                          # one GPU, or the CPU without one
    $L/local_fsdp.yaml --num_processes 8 recipes/llm.py --model 1B            # a node; or local_zero1, zero2, zero3
    $L/local_hsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \\
        --num_processes 32 --parallelism_config_dp_replicate_size 4 recipes/llm.py --model 8B  # on each of four nodes

A step's loss is the sum of its tokens' losses over their number in the whole global batch, which every process knows
from the corpus. The usual mean of each micro-batch weighs a token by the company it is in.

When: you have a text, or a pretrained network for it. Measured on Python's help, 2 CPU cores, three seeds: 2.26 bits
per byte (2.22 to 2.36) of held-out topics after 54 to 71 s (benchmarks/results/accuracy_llm_cpu2_2026-12-01.json). For
the same text zlib takes 2.47 bits per byte, and xz 2.30, as the first lines of a run say.
"""

import sys
from dataclasses import dataclass, replace
from typing import Literal

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
        states = self.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        labels = tokens if labels is None else labels  # settle_buckets and check_head give tokens alone
        total = torch.zeros((), device=tokens.device)
        for part, those in zip(states.flatten(0, 1).split(CHUNK), labels.flatten().split(CHUNK), strict=True):
            total = total + checkpoint(self._chunk, part, those, use_reentrant=False, preserve_rng_state=False)
        return total

    def _chunk(self, states, labels):
        logits = self.get_output_embeddings()(states)
        return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


def build_loaders(accelerator, run_config, text, config):
    """Return the training and evaluation loaders of this process's share; sequences depend on seed and step alone."""
    tokenizer = pretrained_tokenizer(find_pretrained(config.pretrained)) if config.pretrained else None
    corpora = open_corpus(text.data, text.val_fraction)
    views = build_sequences(accelerator, run_config, text, config, corpora, tokenizer)
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
