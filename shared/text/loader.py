# SPDX-License-Identifier: Apache-2.0
"""Cut documents into sequences of tokens and batch them.

Each loader already has only this process's share: it must not go through `accelerator.prepare`.
"""

import atexit
import lzma
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..collectives import data_parallel
from ..contracts import Description
from ..draws import augmentation_seed, digest
from ..errors import UserError
from ..lifetime import die_with_parent, end_workers, ignore_signals
from ..metrics import IGNORED
from ..order import EvaluationOrder, TrainingOrder, micro_batch_size
from .corpus import Corpus, Document
from .settings import TextConfig
from .tokenizer import Tokenizer, byte_tokenizer, train_tokenizer

COMPRESSED = 2**23  # bytes of held-out text, at most, that zlib and xz compress for comparison


class Batch(NamedTuple):
    """One micro-batch (contracts.py) of B sequences of S tokens."""

    tokens: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64: the token that follows each, or IGNORED
    positions: Tensor | None  # (B, S) int64: where documents are packed, each token's place in its own; else None
    indices: Tensor  # (B,) int64, on the host: which sequences these are; -1 is none
    seeds: Tensor  # (B,) int64, on the host: each sequence's seed, from which a model may draw
    digest: int
    step_weight: float = 0.0  # W: counted tokens of the global step
    parts: int = 1
    rejected: tuple[str, ...] = ()
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Sequences(Dataset):
    """Documents as tokens, end to end, and the pieces of them that are trained on; indexed by (epoch, piece)."""

    tokens: np.ndarray  # (T,) int32
    learned: np.ndarray  # (T,) bool: whether a token counts where it is a label
    pieces: np.ndarray  # (N, 2) int64: first input token, and number of input tokens
    counted: np.ndarray  # (N,) int64: labels that count
    length: int  # S
    byte_count: int  # of the text that counted labels spell
    corpus: Corpus
    tokenizer: Tokenizer
    notes: tuple[str, ...]
    seed: int = 0
    order: TrainingOrder | EvaluationOrder | None = None

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        indices = torch.tensor([index for _, index in samples])
        tokens = torch.zeros(len(samples), self.length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        for row, index in enumerate(indices.tolist()):
            if index >= 0:
                self.fill(index, tokens.numpy()[row], labels.numpy()[row])
        seeds = [augmentation_seed(self.seed, *sample) for sample in samples]
        as_int64 = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))
        return Batch(tokens, labels, None, indices, as_int64, digest(indices.tolist(), seeds))

    def fill(self, index: int, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Write a piece's inputs and labels to the beginning of two rows (S,)."""
        first, count = self.pieces[index].tolist()
        tokens[:count] = self.tokens[first : first + count]
        following = slice(first + 1, first + count + 1)
        labels[:count] = np.where(self.learned[following], self.tokens[following], IGNORED)


def build_sequences(
    accelerator: Accelerator, run_config, text: TextConfig, config, corpora: tuple[Corpus, Corpus],
    tokenizer: Tokenizer | None = None, pack: Callable[[Sequences], Sequences] = lambda sequences: sequences,
) -> list[Sequences]:  # fmt: skip
    """Return this process's share of the training and of the held-out sequences. tokenizer: None is --tokenizer's.
    pack: what a recipe makes of each part's sequences before they have an order.

    Raises UserError where the batch does not divide among the processes, or no token of a part would count.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would warn of each fork
    if tokenizer is None and text.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif tokenizer is None:
        tokenizer = train_tokenizer((_spelled(each) for each in corpora[0].documents), text.vocabulary_size)
    seed, share = run_config.seed, data_parallel(accelerator)
    batch = micro_batch_size(config, share[1])
    train, held_out = (pack(cut(corpus, tokenizer, text)) for corpus in corpora)
    orders = (
        TrainingOrder(len(train), config.global_batch_size, batch, *share, seed, weights=train.counted),
        EvaluationOrder(len(held_out), batch, *share),
    )
    return [replace(each, seed=seed, order=order) for each, order in zip((train, held_out), orders, strict=True)]


def _spelled(document: Document) -> str:
    return document.prompt + document.text + "".join(each["content"] for each in document.messages)


def cut(corpus: Corpus, tokenizer: Tokenizer, text: TextConfig) -> Sequences:
    """Return the documents' pieces. With --loss_on all a long document has several, which overlap by the token that
    is the label of one and the input of the next; with `completion` it has one, and its end is left out."""
    learn_all, length = text.loss_on == "all", text.sequence_length
    if not learn_all and not any(each.prompt or each.messages for each in corpus.documents):
        raise UserError("--loss_on completion needs prompts, and no document has one. Give --loss_on all.")
    encoded = [tokenizer.tokens(document, learn_all) for document in corpus.documents]
    sizes = np.array([len(tokens) for tokens, _ in encoded])
    tokens, learned = (np.concatenate([np.asarray(each[kind], np.int64) for each in encoded]) for kind in (0, 1))
    inputs, first = sizes - 1, np.cumsum(sizes) - sizes  # the last token of a document is only a label
    number = -(-inputs // length) if learn_all else np.ones_like(inputs)
    document = np.repeat(np.arange(len(sizes)), number)
    place = (np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number)) * length
    pieces = np.stack([first[document] + place, np.minimum(inputs[document] - place, length)], axis=1)
    sums = np.concatenate([[0], np.cumsum(learned)])
    counted = sums[pieces.sum(axis=1) + 1] - sums[pieces[:, 0] + 1]
    notes = [*corpus.notes, *_left_out(corpus, document[counted == 0], inputs, text)]
    if not counted.any():
        raise UserError(f"{notes[-1]}. No document is left. Give a larger --sequence_length.")
    spelled = [_counted_bytes(each, learn_all) for each in corpus.documents]
    shares = np.bincount(document, counted, len(sizes)) / np.maximum(np.add.reduceat(learned, first), 1)
    return Sequences(
        tokens.astype(np.int32), learned.astype(bool), pieces[counted > 0], counted[counted > 0], length,
        round(float(np.dot(spelled, shares))), corpus, tokenizer, tuple(notes),
    )  # fmt: skip


def _left_out(corpus: Corpus, useless: np.ndarray, inputs: np.ndarray, text: TextConfig) -> Iterator[str]:
    """Yield lines on what `completion` loses at the sequence's end: the rest of a document, or all that counts."""
    length = text.sequence_length
    if text.loss_on == "completion" and (long := np.count_nonzero(inputs > length)):
        yield f"{long:,} documents are cut after {length} tokens"
    if len(useless):
        names = ", ".join(corpus.documents[each].name for each in useless[:3].tolist())
        yield f"left out {len(useless):,} documents of which no token counts within {length}: {names}"


def _counted_bytes(document: Document, learn_all: bool) -> int:
    if learn_all:
        return len(_spelled(document).encode())
    answers = [each["content"] for each in document.messages if each["role"] == "assistant"]
    return len("".join([document.text, *answers]).encode())


class Loader:
    """Batches on the device; for training, from any global step to the end of that step's epoch."""

    rejects = "rejected"

    def __init__(self, dataset: Sequences, device: torch.device, num_workers: int):
        self.dataset, self.order, self.device = dataset, dataset.order, device
        self.noted: Callable[[], str] = str
        begin = partial(_begin_worker, os.getpid())
        # Runs before multiprocessing waits for the workers: it sends SIGTERM, which they ignore. Two calls do no harm.
        atexit.unregister(end_workers)
        atexit.register(end_workers)
        self.batches = DataLoader(
            dataset, batch_sampler=dataset.order, collate_fn=_as_is, num_workers=num_workers,
            persistent_workers=num_workers > 0, pin_memory=device.type == "cuda", generator=torch.Generator(),
            worker_init_fn=begin, multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.order)

    def starting_at(self, step: int) -> "Loader":
        """Start the next pass at this global step."""
        self.order.step = step
        return self

    def __iter__(self) -> Iterator[Batch]:
        order, begin = self.order, time.perf_counter()
        for number, batch in enumerate(self.batches):
            waited = time.perf_counter() - begin
            moved = {name: getattr(batch, name).to(self.device, non_blocking=True) for name in ("tokens", "labels")}
            if batch.positions is not None:
                moved["positions"] = batch.positions.to(self.device, non_blocking=True)
            if isinstance(order, TrainingOrder):
                step = order.step + number // (order.share // order.micro_batch_size)
                moved |= {"step_weight": order.step_weight(step), "parts": order.parts}
            yield batch._replace(wait_seconds=waited, **moved)
            begin = time.perf_counter()

    def sample(self) -> Tensor:
        """Return a batch of one sequence, as the network takes it."""
        return torch.zeros(1, self.dataset.length, dtype=torch.int64, device=self.device)

    def describe(self) -> Description:
        data = self.dataset
        tokenizer = data.tokenizer
        return Description(
            unit="sequences",
            samples=len(data),
            fingerprint=data.corpus.fingerprint,
            summary=f"{len(data.corpus.documents):,} documents, {int(data.counted.sum()):,} counted tokens, "
            f"{data.byte_count:,} bytes, {len(data):,} sequences{self._compressed()}",
            notes=(f"the network sees {data.length} of {tokenizer.size:,} tokens at once", *data.notes),
            identity={"tokenizer_sha256": tokenizer.sha256},
            record={"vocabulary": tokenizer.size},
            files=(("tokenizer.json", tokenizer.text),) if tokenizer.text else (),
        )

    def _compressed(self) -> str:
        """Return what general compressors make of the held-out text, a scale for bits per byte."""
        data = self.dataset
        if isinstance(self.order, TrainingOrder) or data.byte_count > COMPRESSED:
            return ""
        text = "".join(_spelled(each) for each in data.corpus.documents).encode()
        sizes = {"zlib": len(zlib.compress(text, 9)), "xz": len(lzma.compress(text))}
        return "; " + ", ".join(f"{name} {8 * size / len(text):.2f} bits per byte" for name, size in sizes.items())

    def check_rejected(self, rejected: int, samples: int) -> None:
        assert not rejected  # documents are checked when they are read


def _as_is(batch: Batch) -> Batch:
    return batch


def _begin_worker(parent: int, worker: int) -> None:
    ignore_signals()
    die_with_parent(signal.SIGKILL, parent)
