# SPDX-License-Identifier: Apache-2.0
"""Turn documents into tokens: by a byte-level BPE trained on them, byte by byte, or as a pretrained network does."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .corpus import Document

END = "<|endoftext|>"


class Tokenizer(NamedTuple):
    """A vocabulary. begin and end: the tokens around a document; a pretrained network may have no begin."""

    encode: Callable[[str], list[int]]  # adds no token of its own
    begin: int | None
    end: int
    size: int
    sha256: str
    text: str = ""  # tokenizer.json of one that was trained here
    chat: object = None  # transformers' tokenizer, which knows the form of conversations

    def tokens(self, document: Document, learn_all: bool) -> tuple[list[int], list[bool]]:
        """Return a document's tokens, and for each whether it is learned: all but `begin`, or only what completes a
        prompt or answers a user, and the end."""
        if document.messages:
            return self._conversation(document, learn_all)
        first = [] if self.begin is None else [self.begin]
        prompt, text = (self.encode(each) for each in (document.prompt, document.text))
        if first and (prompt + text)[:1] == first:
            raise UserError(f"{document.name} begins with the tokenizer's own first token. Take it out of the text.")
        learned = [False] * len(first) + [learn_all] * len(prompt) + [True] * (len(text) + 1)
        return [*first, *prompt, *text, self.end], learned

    def _conversation(self, document: Document, learn_all: bool) -> tuple[list[int], list[bool]]:
        from jinja2 import TemplateError

        template = getattr(self.chat, "chat_template", None)
        if not template:
            raise UserError(f"{document.name} has messages, and the tokenizer has no chat template. Give prompts.")
        if not learn_all and "{% generation %}" not in template.replace("{%-", "{%").replace("-%}", "%}"):
            why = "the tokenizer's chat template has no {% generation %} around what the assistant says"
            raise UserError(f"{why}: --loss_on completion needs it. Add it, or give --loss_on all.")
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": not learn_all}
        try:
            made = self.chat.apply_chat_template(list(document.messages), **options)
        except TemplateError as error:
            raise UserError(f"{document.name}: the chat template refuses it: {error}. Change its messages.") from error
        tokens = made["input_ids"]
        learned = [True] * len(tokens) if learn_all else [bool(each) for each in made["assistant_masks"]]
        if tokens[-1] != self.end:
            tokens, learned = [*tokens, self.end], [*learned, True]
        return tokens, [False, *learned[1:]]


def byte_tokenizer() -> Tokenizer:
    """Return 256 tokens, one for each byte, and the end's."""
    return Tokenizer(lambda text: [*text.encode()], 256, 256, 257, "bytes")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a byte-level BPE (Sennrich et al., arXiv:1508.07909); it is a function of the texts alone."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": [END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
    library.train_from_iterator(texts, trainer)
    library.encode_special_tokens = True  # a document that quotes END does not end there
    text, end = library.to_str(), library.token_to_id(END)
    count = library.get_vocab_size()
    return Tokenizer(lambda text: library.encode(text).ids, end, end, count, _hash(text.encode()), text)


def pretrained_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder that transformers saved. Raises UserError where it has none."""
    from transformers import AutoTokenizer

    try:
        library = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"--pretrained {folder} has no tokenizer that transformers reads. Copy it there.") from error
    if library.eos_token_id is None:
        raise UserError(f"the tokenizer of --pretrained {folder} has no end-of-text token. Set its eos_token.")
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*token*")) + sorted(folder.glob("*.jinja")))

    def encode(text: str) -> list[int]:
        return library.encode(text, add_special_tokens=False)

    return Tokenizer(encode, library.bos_token_id, library.eos_token_id, len(library), _hash(content), chat=library)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
