# SPDX-License-Identifier: Apache-2.0
"""shared/text/: documents, tokens, the sequences that a step sees and the tokens that it counts, on any topology."""

import json
import math
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Library
from transformers import PreTrainedTokenizerFast

from shared.config import RunConfig
from shared.errors import UserError
from shared.metrics import IGNORED
from shared.text import Evaluation, Loader, TextConfig, build_sequences, open_corpus
from shared.text.corpus import Document
from shared.text.tokenizer import END, byte_tokenizer, pretrained_tokenizer, train_tokenizer

ALONE = SimpleNamespace(mesh=None, device=torch.device("cpu"))
PAIRS = [{"prompt": f"What is {a} + {a}? ", "completion": f"It is {2 * a}."} for a in range(40)]
CHAT = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
CHAT += "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"


class Mesh:
    """A mesh of data-parallel processes, as collectives.data_parallel asks it."""

    def __init__(self, rank: int, size: int):
        self.rank, self.number = rank, size

    def __getitem__(self, name: str) -> "Mesh":
        return self

    def size(self) -> int:
        return self.number

    def get_local_rank(self, name: str) -> int:
        return self.rank


def sequences(text: TextConfig, rank: int = 0, size: int = 1, accumulation: int = 1, tokenizer=None):
    config = SimpleNamespace(global_batch_size=16, gradient_accumulation_steps=accumulation)
    accelerator = SimpleNamespace(mesh=Mesh(rank, size))
    corpora = open_corpus(text.data, text.val_fraction)
    return build_sequences(accelerator, RunConfig(), text, config, corpora, tokenizer)


def write_lines(path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


# Documents


def test_pythons_help_is_split_by_the_names_of_its_documents():
    train, held_out = open_corpus("python", 0.1)
    names = [{each.name for each in part.documents} for part in (train, held_out)]
    assert {*topics} - (names[0] | names[1]) <= {"if"}  # other topics quote all of it
    assert not names[0] & names[1]
    paragraphs = [
        {" ".join(text.split()) for each in part.documents for text in each.text.split("\n\n")}
        for part in (train, held_out)
    ]
    assert not paragraphs[0] & paragraphs[1]  # the topics quote each other
    everything = {" ".join(text.split()) for topic in topics.values() for text in topic.split("\n\n")}
    assert paragraphs[0] | paragraphs[1] == everything - {""}
    assert 0.05 < len(names[1]) / len(topics) < 0.2
    assert open_corpus("python", 0.1)[0].fingerprint == train.fingerprint
    fewer = {each.name for each in open_corpus("python", 0.05)[1].documents}
    assert fewer < names[1]  # a name's place does not depend on the others


def test_pythons_docstrings_are_pairs():
    train, _ = open_corpus("docstrings", 0.1)
    assert len(train.documents) > 1000
    (found,) = [each for each in train.documents if each.name.startswith("textwrap.dedent ")]
    assert (found.prompt, found.text) == (
        "def dedent(text):\n",
        "Remove any common leading whitespace from every line in `text`.",
    )


def test_a_folder_with_train_and_val_keeps_its_parts(tmp_path):
    for part, count in (("train", 5), ("validation", 2)):
        for number in range(count):
            path = tmp_path / part / f"{number}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{part} {number}")
    (tmp_path / "readme.txt").write_text("not to be learned")
    parts = open_corpus(str(tmp_path), 0.5)
    assert [len(part.documents) for part in parts] == [5, 2]
    assert parts[0].notes == ["left out 1 other folders' documents: readme.txt"]


def test_what_cannot_be_used_is_named_and_counted(tmp_path):
    write_lines(tmp_path / "a.jsonl", [*PAIRS, '{"prompt": "cut', {"prompt": "no answer", "completion": " "}])
    write_lines(tmp_path / "b.jsonl", [{"text": f"Text {number}"} for number in range(20)])
    train, held_out = open_corpus(str(tmp_path), 0.2)
    assert train.notes == ["left out 1 invalid JSON documents: a.jsonl:41", "left out 1 empty documents: a.jsonl:42"]
    assert len(train.documents) + len(held_out.documents) == 60


def test_a_table_gives_the_documents_of_its_lines(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "table/a.parquet", row_group_size=7)
    write_lines(tmp_path / "lines/a.parquet.jsonl", PAIRS)
    found = [
        [each for part in open_corpus(str(tmp_path / name), 0.2) for each in part.documents]
        for name in ("table", "lines")
    ]
    assert sorted(each[1:] for each in found[0]) == sorted(each[1:] for each in found[1])
    assert {each.name for each in found[0]} == {f"a.parquet:{number}" for number in range(1, 41)}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "holds no .txt, .jsonl, .parquet file"),
        ([{"body": "x"}], "row a.jsonl:1 has body. Give text, or prompt and completion, or messages."),
        ([3], "row a.jsonl:1 has int."),
        ([{"text": 3}], "row a.jsonl:1 has something else than text as its text. Write strings;"),
        ([{"messages": ["x"]}], "row a.jsonl:1 has something else than text as its messages."),
        ([{"messages": [{"content": "x"}]}], "a message has a role and a content."),
        ([{"messages": [{"role": "user"}]}], "row a.jsonl:1 has something else than text as its messages."),
        (
            ["{", {"text": ""}],
            "no training document (0 usable documents; left out 1 invalid JSON documents: a.jsonl:1;",
        ),
        ([{"text": "x"}], "has no held-out document (1 usable documents)"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(tmp_path, rows, words):
    if rows:
        write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError) as error:
        open_corpus(str(tmp_path), 0.0)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_table_is_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"a.parquet is damaged, or no parquet file: .*Write it again"):
        open_corpus(str(tmp_path), 0.1)


def test_a_text_that_is_not_utf_8_is_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt is not UTF-8"):
        open_corpus(str(tmp_path), 0.1)


# Tokens


def test_a_trained_tokenizer_depends_on_the_texts_alone_and_loses_nothing():
    texts = [text for _, text in sorted(topics.items())]
    one, other = (train_tokenizer(texts, 600) for _ in range(2))
    assert (one.size, one.sha256) == (600, other.sha256)
    library = Library.from_str(one.text)
    said = f"naïve {END} \t\n 漢字"
    tokens, learned = one.tokens(Document("a", said), learn_all=True)
    assert (tokens[0], tokens[-1]) == (one.begin, one.end)
    assert one.end not in tokens[1:-1]  # the quoted one does not end the document
    assert library.decode(tokens[1:-1], skip_special_tokens=False) == said
    assert learned == [False] + [True] * (len(tokens) - 1)


def test_a_prompt_is_read_and_its_completion_and_end_are_learned():
    tokens, learned = byte_tokenizer().tokens(Document("a", "yes", "Is it? "), learn_all=False)
    assert bytes(token for token, counts in zip(tokens, learned, strict=True) if counts and token < 256) == b"yes"
    assert learned[-1]
    assert tokens[-1] == 256
    assert sum(learned) == 4


@pytest.fixture
def saved(tmp_path):
    """A folder with a tokenizer as transformers saves one, whose pad token is its end."""

    def save(template: str | None = None):
        trained = train_tokenizer(["It is. What is it? user: assistant: "] * 3, 300)
        library = PreTrainedTokenizerFast(
            tokenizer_object=Library.from_str(trained.text), bos_token=END, eos_token=END, pad_token=END
        )
        library.chat_template = template
        library.save_pretrained(tmp_path / "network")
        return pretrained_tokenizer(tmp_path / "network")

    return save


def test_of_a_conversation_the_assistants_words_are_learned(saved):
    tokenizer = saved(CHAT)
    messages = ({"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is."})
    tokens, learned = tokenizer.tokens(Document("a", messages=messages), learn_all=False)
    answer = [token for token, counts in zip(tokens, learned, strict=True) if counts]
    assert tokenizer.chat.decode(answer) == f"It is.{END}"
    assert tokens[-1] == tokenizer.end


def test_tokenizers_that_cannot_do_it_are_one_line(saved, tmp_path):
    messages = Document("a.jsonl:1", messages=({"role": "user", "content": "x"},))
    with pytest.raises(UserError, match=r"a.jsonl:1 has messages, and the tokenizer has no chat template"):
        saved().tokens(messages, learn_all=True)
    with pytest.raises(UserError, match=r"no \{% generation %\} around what the assistant says"):
        saved("{% for m in messages %}{{ m.content }}{% endfor %}").tokens(messages, learn_all=False)
    with pytest.raises(UserError, match=r"a.jsonl:1: the chat template refuses it: roles must alternate"):
        saved("{{ raise_exception('roles must alternate') }}").tokens(messages, learn_all=True)
    with pytest.raises(UserError, match=r"a.txt begins with the tokenizer's own first token"):
        saved().tokens(Document("a.txt", f"{END}It is."), learn_all=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        pretrained_tokenizer(tmp_path / "empty")


# Sequences


def test_every_byte_is_a_label_once():
    for part in sequences(TextConfig(tokenizer="bytes", sequence_length=100)):
        spelled = bytearray()
        for index in range(len(part)):
            tokens, labels = np.zeros(100, np.int64), np.full(100, IGNORED)
            part.fill(index, tokens, labels)
            count = part.counted[index]
            assert (labels[:count] != IGNORED).all()
            assert (labels[count:] == IGNORED).all()
            assert (tokens[1:count] == labels[: count - 1]).all()
            spelled += bytes(label for label in labels[:count].tolist() if label < 256)
        assert spelled.decode() == "".join(each.text for each in part.corpus.documents)
        assert part.byte_count == len(spelled)
        assert part.counted.sum() == len(spelled) + len(part.corpus.documents)  # and each document's end


def test_a_completion_behind_the_sequences_end_is_left_out_and_named(tmp_path):
    long = {"prompt": "x" * 60, "completion": "y"}
    write_lines(tmp_path / "a.jsonl", [*PAIRS, long])
    text = TextConfig(data=str(tmp_path), tokenizer="bytes", sequence_length=25, loss_on="completion")
    train, held_out = sequences(text)
    cut = sum(len(each.prompt + each.text) + 1 > 25 for each in train.corpus.documents)
    noted = [note for part in (train, held_out) for note in part.notes]
    assert "left out 1 documents of which no token counts within 25: a.jsonl:41" in noted
    assert f"{cut} documents are cut after 25 tokens" in train.notes
    assert len(train) + len(held_out) == 40
    whole = sequences(TextConfig(data=str(tmp_path), tokenizer="bytes", sequence_length=80, loss_on="completion"))[0]
    assert whole.byte_count == sum(len(each.text) for each in whole.corpus.documents)
    with pytest.raises(UserError, match=r"within 2: .* No document is left. Give a larger --sequence_length"):
        sequences(TextConfig(data=str(tmp_path), tokenizer="bytes", sequence_length=2, loss_on="completion"))
    with pytest.raises(UserError, match="--loss_on completion needs prompts"):
        sequences(TextConfig(loss_on="completion"))


def steps(size: int, accumulation: int, workers: int, begin: int = 0) -> list[tuple]:
    """Return each step of the rest of an epoch: its rows in the global order, its digest and its weight."""
    text, found = TextConfig(tokenizer="bytes", sequence_length=300), {}
    for rank in range(size):
        loader = Loader(sequences(text, rank, size, accumulation)[0], torch.device("cpu"), workers)
        for number, batch in enumerate(loader.starting_at(begin)):
            assert batch.parts == size * accumulation
            found.setdefault(begin + number // accumulation, []).append(batch)
    made = []
    for batches in found.values():
        tokens, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels"))
        (weight,) = {batch.step_weight for batch in batches}
        assert weight == (labels != IGNORED).sum()
        made.append((tokens.tolist(), labels.tolist(), sum(batch.digest for batch in batches) % 2**64, weight))
    return made


@pytest.mark.parametrize(("size", "accumulation", "workers"), [(1, 4, 1), (2, 1, 0), (4, 4, 0)])
def test_a_step_sees_the_same_sequences_on_any_topology(size, accumulation, workers):
    alone = steps(1, 1, 0)
    assert len(alone) == len(sequences(TextConfig(tokenizer="bytes", sequence_length=300))[0]) // 16
    assert steps(size, accumulation, workers, begin=len(alone) - 5) == alone[-5:]


def test_held_out_sequences_count_once_on_any_number_of_processes():
    text, found = TextConfig(tokenizer="bytes", sequence_length=300), []
    for rank in range(3):
        config = SimpleNamespace(global_batch_size=15, gradient_accumulation_steps=1)
        corpora = open_corpus(text.data, text.val_fraction)
        part = build_sequences(SimpleNamespace(mesh=Mesh(rank, 3)), RunConfig(), text, config, corpora)[1]
        for batch in Loader(part, torch.device("cpu"), 0):
            found += batch.indices[batch.indices >= 0].tolist()
            assert (batch.labels[batch.indices < 0] == IGNORED).all()
    assert sorted(found) == list(range(len(part)))


def test_a_run_says_what_it_reads_and_what_compressors_make_of_it():
    train, held_out = (Loader(each, torch.device("cpu"), 0).describe() for each in sequences(TextConfig()))
    assert train.unit == "sequences"
    assert "zlib" not in train.summary
    assert "; zlib 2." in held_out.summary
    assert ", xz 2." in held_out.summary
    assert train.identity["tokenizer_sha256"] == held_out.identity["tokenizer_sha256"]
    assert train.notes[0] == "the network sees 128 of 1,024 tokens at once"


# Evaluation


def test_an_evaluation_weighs_every_token_the_same():
    evaluation = Evaluation()
    for loss, counted in ((8.0, 2), (1.0, 5)):
        evaluation.add(torch.tensor(loss), torch.tensor([[1] * counted + [IGNORED] * (6 - counted)]))
    result = evaluation.result(ALONE, samples=2, byte_count=20)
    assert result["eval_loss"] == pytest.approx(9 / 7)
    assert result["perplexity"] == pytest.approx(math.exp(9 / 7))
    assert result["bits_per_byte"] == pytest.approx(9 / math.log(2) / 20)
    assert result["eval_samples"] == 2
