# SPDX-License-Identifier: Apache-2.0
"""A data set is read by one rule, whatever holds it; what can be read in two ways is refused by name."""

import importlib
import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT, launch_command
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from shared.errors import UserError
from shared.images import Source, open_data
from shared.images.storage import Pixels
from shared.images.tree import parts_of_files


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        return importlib.import_module("pack")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def picture(colour="red", kind="PNG", size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, data: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(data, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        open_data(str(data), *(arguments or (0.0, 0)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Class folders, in whatever holds them


def tree(*folders: str, count: int = 2) -> list[str]:
    return [f"{folder}/{number}.jpg" for folder in folders for number in range(count)]


PLAIN = tree("train/cat", "train/dog", "val/cat", "val/dog")
TREES = {
    "plain": (PLAIN, (4, 4)),
    "nested": (tree(*(f"{part}/{kind}/{eye}" for part in ("train", "val") for kind in "ab" for eye in "lr")), (8, 8)),
    "hidden": (
        [*PLAIN, *tree("train/.ipynb_checkpoints", "val/cat/@eaDir", "__MACOSX/bird"), "val/cat/._0.jpg"],
        (4, 4),
    ),
    "other names": ([name.replace("train", "training").replace("val", "test") for name in PLAIN], (4, 4)),
    "three parts": ([*PLAIN, *tree("test/cat", "test/dog")], "has val and test"),
    "two names of a part": ([*PLAIN, *tree("dev/cat", "dev/dog")], "has val and dev"),
    "flat test": ([*tree("train/cat", "train/dog"), "test/0.jpg"], "test holds no class folders.*jpg: 1"),
    "class of val alone": ([*PLAIN, *tree("val/bird")], "bird has held-out images only"),
    "all below test": ([f"test/{name}" for name in PLAIN], r"test/ but no train/. Give --data \S+/test\."),
    "wrapped": ([f"x/{name}" for name in PLAIN], r"x holds train and val, which name parts. Give --data \S+/x\."),
    "wrapped train": (tree("x/train/cat", "x/train/dog"), r"x holds train, which name parts. Give --data \S+/x\."),
    "capitals": (
        [name.replace("train", "Train").replace("val", "Val") for name in PLAIN],
        "Rename them to train, val",
    ),
    "Training": (tree("Training/cat", "Training/dog", "Testing/cat"), "Rename them to testing, training"),
    "one capital": ([name.replace("val", "Val") for name in PLAIN], "Rename Val to val"),
    "parts below classes": (tree("cat/train", "cat/val", "dog/train", "dog/val"), "Move the classes into the parts"),
    "one class": (tree("train/cat", "val/cat"), "has one class, cat"),
    "one folder": (tree("cat"), "has one class, cat, so there is nothing to classify. Put the images"),
    "no images": ([*PLAIN, "train/fish/a.txt"], r"train/fish holds no images, but 1 files \(.txt: 1\)"),
    "two kinds": ([*PLAIN, "train/a.parquet"], "holds images and tables, such as train/a.parquet"),
}


def hold(names: list[str], kind: str, folder: Path) -> Path:
    if kind == "backslash.zip":
        with zipfile.ZipFile(folder / "data.zip", "w") as archive:
            for name in names:
                archive.writestr(name.replace("/", "\\"), name)
        return folder / "data.zip"
    for name in names:
        write(folder / "data" / name, name)
    return Path(shutil.make_archive(str(folder / "data"), kind, folder / "data")) if kind else folder / "data"


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_read_alike_in_a_folder_and_in_an_archive(tool, tmp_path, name):
    names, expected = TREES[name]
    found = {}
    for kind in ("", "tar", "zip", "backslash.zip"):
        (tmp_path / f"in-{kind}").mkdir()
        data = hold(names, kind, tmp_path / f"in-{kind}")
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                tool.open_source(str(data), 0.5)
            continue
        parts = tool.open_source(str(data), 0.0)
        assert tuple(map(len, parts)) == expected
        found[kind] = [
            (part.classes, part.labels.tolist(), [part.images[number] for number in range(len(part))])
            for part in parts
        ]
        assert all(part.classes[label].encode() in image for part in parts for label, image in images_of(part))
    assert all(one == found[""] for one in found.values())


def images_of(part: Source):
    return [(label, part.images[number]) for number, label in enumerate(part.labels)]


def test_a_folder_in_an_archive_is_packed_and_a_recipe_names_the_tool(tool, tmp_path, monkeypatch):
    names = [f"photographs/{name}" for name in PLAIN]
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(name, picture("red" if "cat" in name else "blue"))
    words = ["pack.py", f"{archive}/photographs", str(tmp_path / "packed"), "--format", "tar", "--num_workers", "1"]
    monkeypatch.setattr("sys.argv", words)
    tool.main(tool.parse())
    train, held_out = open_data(str(tmp_path / "packed"), 0, 0)
    assert (train.classes, train.labels.tolist(), held_out.labels.tolist()) == (
        ["cat", "dog"],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    )
    assert "python tools/pack.py" in refusal(archive)


def test_what_is_left_out_is_counted_and_said(tmp_path, capfd):
    for part in ("train", "val"):
        for name in ("cat/0.jpg", "dog/0.gif", "dog/1.jfif", "dog/2", "dog/3.txt", "dog/4.txt", "dog/Thumbs.db"):
            write(tmp_path / "data" / part / name)
    write(tmp_path / "data/notes.jpg")
    train, _ = open_data(str(tmp_path / "data"), 0, 0)
    assert train.labels.tolist() == [0, 1, 1]
    for _ in range(2):  # from the cache, too
        said = capfd.readouterr().err
        assert said.count("train: 3 files (.txt: 2, no ending: 1) in class folders are not images") == 1
        assert said.count("1 files (.jpg: 1) in no class folder, or in no part, are left out") == 1
        open_data(str(tmp_path / "data"), 0, 0)


def test_links_are_followed_once_and_never_upwards(tmp_path, capfd):
    for name in PLAIN:
        write(tmp_path / "data" / name)
    write(tmp_path / "more/9.jpg")
    for name, target in (("loop", ".."), ("all", tmp_path), ("more", tmp_path / "more"), ("again", tmp_path / "more")):
        (tmp_path / "data/train/cat" / name).symlink_to(target)
    train, held_out = open_data(str(tmp_path / "data"), 0, 0)
    assert (len(train), len(held_out)) == (5, 4)
    assert capfd.readouterr().err.count("is a link to a folder that is read already") == 3


def test_a_change_below_a_class_folder_is_seen(tmp_path):
    for name in TREES["nested"][0]:
        write(tmp_path / name)
    assert len(open_data(str(tmp_path), 0, 0)[0]) == 8
    write(tmp_path / "train/a/l/7.jpg")
    assert len(open_data(str(tmp_path), 0, 0)[0]) == 9
    (tmp_path / "train/b/r/0.jpg").unlink()
    assert len(open_data(str(tmp_path), 0, 0)[0]) == 8
    write(tmp_path / "val/a/l/deeper/0.jpg")
    assert len(open_data(str(tmp_path), 0, 0)[1]) == 9


def test_names_that_are_not_utf8(tool, tmp_path):
    folder = os.fsencode(tmp_path) + b"/data"
    for part in (b"train", b"val"):
        for name in (b"caf\xe9/\xff.jpg", b"dog/1.jpg"):
            write(Path(os.fsdecode(folder + b"/" + part + b"/" + name)), part + name)
    (tmp_path / "list.csv").write_bytes(
        b"path,label,split\ndata/train/caf\xe9/\xff.jpg,caf,train\ndata/train/dog/1.jpg,dog,train\n"
        b"data/val/caf\xe9/\xff.jpg,caf,val\ndata/val/dog/1.jpg,dog,val\n"
    )
    archive = shutil.make_archive(str(tmp_path / "archive"), "tar", folder.decode())
    for parts in (
        open_data(os.fsdecode(folder), 0, 0),
        tool.open_source(archive, 0),
        open_data(f"{tmp_path}/list.csv", 0, 0),
    ):
        assert parts[0].images[0] == b"traincaf\xe9/\xff.jpg"
        assert parts[1].images[1] == b"valdog/1.jpg"


# Names of files say their part


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"], {"train": 1, "test": 1}),
        (["train.tar", "Validation2.tar"], {"train": 1, "validation": 1}),
        (["default/train/0.parquet", "default/test/0.parquet"], {"train": 1, "test": 1}),
        (["train/00/a.tar", "train/01/a.tar", "val/a.tar"], {"train": 2, "val": 1}),
        (["val/imagenet-validation-0.tar"], {"val": 1}),
        (["trainer-0.tar", "latest.tar"], {"": 2}),
        (["train-val.tar"], "names train and val"),
        (["train/test-0.tar"], "names test and train"),
        (["fine/train.parquet", "coarse/train.parquet"], "in several folders"),
    ],
)
def test_parts_of_files(files, parts):
    if isinstance(parts, str):
        with pytest.raises(UserError, match=parts):
            parts_of_files(files, "x")
    else:
        assert {name: len(found) for name, found in parts_of_files(files, "x").items()} == parts


def shard(path: Path, labels: dict[str, object], kind: str = "png", colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label in labels.items():
            for name, data in ((f"{key}.{kind}", picture(colour)), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def labels(count: int = 4, first: int = 0) -> dict[str, int]:
    return {f"{number:03d}": number % 2 for number in range(first, first + count)}


def test_shards_of_several_parts_in_one_folder(tmp_path):
    for name, count in (("train-0.tar", 4), ("train-1.tar", 4), ("test-0.tar", 2)):
        shard(tmp_path / name, {f"{name[:-4]}/{key}": label for key, label in labels(count).items()})
    train, held_out = open_data(str(tmp_path), 0, 0)
    assert [len(train), len(held_out), train.images.index.shard.max(), held_out.images.index.shard.max()] == [
        8,
        2,
        1,
        0,
    ]
    assert held_out.images.name(0) == f"{tmp_path}/test-0.tar: test-0/000"
    assert all(part.images[number] == picture() for part in (train, held_out) for number in range(2))
    shard(tmp_path / "more.tar", labels())
    assert "files of no part" in refusal(tmp_path)
    (tmp_path / "more.tar").rename(tmp_path / "validation.tar")
    assert "has validation and test" in refusal(tmp_path)


def test_shards_hold_what_systems_leave_and_more_than_one_image(tmp_path):
    junk = {"._000": 0, "__MACOSX/001": 1}
    shard(tmp_path / "train/0.tar", labels() | junk)
    shard(tmp_path / "val/0.tar", labels())
    assert [len(part) for part in open_data(str(tmp_path), 0, 0)] == [4, 4]
    shard(tmp_path / "val/0.tar", labels() | {"999": 2})
    assert "class 2 has held-out images only" in refusal(tmp_path)
    shard(tmp_path / "val/0.tar", labels(), "seg.png")
    assert [len(part) for part in open_data(str(tmp_path), 0, 0)] == [4, 4]
    with tarfile.open(tmp_path / "val/0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("000.depth.png"))
    assert "several images of 000: seg.png, depth.png" in refusal(tmp_path)
    for part in ("train", "val"):
        shard(tmp_path / part / "0.tar", dict.fromkeys(labels(), 1))
    assert "all images have the class 1" in refusal(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, None])
def test_a_damaged_header_is_named_and_costs_what_it_hides(tool, tmp_path, kind, capfd):
    """A length of a terabyte must not become one of memory."""
    for part in ("train", "val"):
        shard(tmp_path / part / "0.tar", labels())
    data = bytearray((tmp_path / "train/0.tar").read_bytes())
    begin = data.index(b"002.png")
    header = tarfile.TarInfo("002.png")
    header.size, header.type = 2**40, kind or tarfile.REGTYPE
    data[begin : begin + 512] = b"no header" + bytes(503) if kind is None else header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "train/0.tar").write_bytes(data)
    train, _ = open_data(str(tmp_path), 0, 0)
    assert train.images.index.names[:2].tolist() == [b"000", b"001"]
    assert f"truncated shard: {tmp_path}/train/0.tar" in capfd.readouterr().err
    for number in range(2, len(train)):
        with pytest.raises(OSError, match="too early"):
            train.images[number]
    with pytest.raises(UserError, match=r"0.tar cannot be read: it is truncated or damaged"):
        tool.open_source(str(tmp_path / "train/0.tar"), 0)


# Tables


def table(
    path: Path, names: list[str], label="label", image="image", feature=None, values=None, count=8, **more
) -> None:
    """Rows of which the colour says the class: the first letter of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = [sorted(names)[number % len(names)] for number in range(count)]
    pictures = [{"bytes": picture((ord(name[0]), 0, 0)), "path": None} for name in classes]
    columns = {image: pictures, label: values or [names.index(name) for name in classes]}
    features = {image: datasets.Image(), label: feature or ClassLabel(names=names)}
    for name, (kind, column) in more.items():
        features[name], columns[name] = kind, column(pictures, columns[label])
    rows = Dataset.from_dict(columns, Features(features))
    rows.to_parquet(path) if path.suffix == ".parquet" else rows.save_to_disk(path)


def right(part: Source) -> bool:
    return all(
        part.classes[label][0] == chr(Image.open(io.BytesIO(image)).getpixel((0, 0))[0])
        for label, image in images_of(part)
    )


MORE_LABELS = {"coarse": (ClassLabel(names=["x", "y"]), lambda _, labels: [label // 2 for label in labels])}
MORE_IMAGES = {"mask": (datasets.Image(), lambda images, _: [{"bytes": picture("black"), "path": None}] * len(images))}


@pytest.mark.parametrize("recipe", ["shared.images", "recipes.resnet_hf_datasets"])
def test_several_columns_are_refused_by_name_and_chosen_by_a_flag(tmp_path, recipe):
    opened = importlib.import_module(recipe).open_data
    for part in ("train", "test"):
        table(tmp_path / part / "0.parquet", ["a", "b", "c", "d"], **MORE_LABELS, **MORE_IMAGES)

    def refused(*columns: str) -> str:
        with pytest.raises(UserError) as caught:
            opened(str(tmp_path), 0, 0, 0, *columns)
        return str(caught.value)

    assert "Image columns image, mask. Choose one: --image_column image" in refused("", "")
    assert "ClassLabel columns label, coarse. Choose one: --label_column label" in refused("image", "")
    assert "no column fine. It has image (Image), label (a ClassLabel of a, b, c, d)" in refused("image", "fine")
    assert "--label_column mask is Image, and no ClassLabel" in refused("image", "mask")
    train, held_out = opened(str(tmp_path), 0, 0, 0, "image", "label")
    assert right(train)
    assert right(held_out)
    train, _ = opened(str(tmp_path), 0, 0, 0, "mask", "coarse")
    assert (train.classes, train.labels.tolist()) == (["x", "y"], [0, 0, 1, 1] * 2)
    assert train.images[0] == picture("black")


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_columns_of_what_has_none_are_refused(tmp_path, data):
    for name in PLAIN:
        write(tmp_path / "folder" / name)
    data = data if data == "digits" else tmp_path / data
    for columns in (("image", ""), ("", "label")):
        assert "has no columns. Leave it out" in refusal(data, 0, 0, 0, *columns)


@pytest.mark.parametrize("layout", ["{}/0.parquet", "data/{}-00000-of-00001.parquet", "{}.parquet", "{}"])
def test_labels_of_parts_are_mapped_by_name(tmp_path, layout):
    for part, names in (("train", ["cat", "dog"]), ("test", ["dog", "cat"])):
        table(tmp_path / "data" / layout.format(part), names)
    write(tmp_path / "data/README.md", "---\n")
    if layout == "{}":  # what `map` leaves beside a saved table
        shutil.copy(tmp_path / "data/test/data-00000-of-00001.arrow", tmp_path / "data/train/cache-1.arrow")
    recipe = importlib.import_module("recipes.resnet_hf_datasets")
    for parts in (open_data(str(tmp_path / "data"), 0, 0), recipe.open_data(str(tmp_path / "data"), 0, 0, 0)):
        assert all(right(part) for part in parts)
        assert [part.classes for part in parts] == [["cat", "dog"]] * 2
        assert len(parts[0]) == len(parts[1]) == 8


def test_tables_that_cannot_be_read_as_one(tmp_path):
    table(tmp_path / "train/0.parquet", ["cat", "dog"])
    table(tmp_path / "train/1.parquet", ["dog", "cat"])
    table(tmp_path / "test/0.parquet", ["cat", "dog"])
    assert (
        "1.parquet: its column label is a ClassLabel of dog, cat, but a ClassLabel of cat, dog in 0.parquet"
        in refusal(tmp_path)
    )
    write(tmp_path / "train/1.parquet", b"PAR1 damaged")
    assert "1.parquet cannot be read: " in refusal(tmp_path)
    (tmp_path / "train/1.parquet").unlink()
    table(tmp_path / "validation/0.parquet", ["cat", "dog"])
    assert "has validation and test" in refusal(tmp_path)


@pytest.mark.parametrize(("kind", "value"), [("int64", 1), ("string", "cat"), ("float32", 0.25)])
def test_a_column_that_is_no_class_is_refused_by_what_it_holds(tmp_path, kind, value):
    table(tmp_path / "0.parquet", ["cat", "dog"], feature=Value(kind), values=[value] * 8)
    assert f"no ClassLabel among its columns image (Image), label ({kind})" in refusal(tmp_path, 0.5, 0)


# Labels


def test_a_source_casts_no_label():
    for array in (np.array([0.25, 0.5, 1.25]), np.eye(3), np.array(["a", "b", "c"])):
        with pytest.raises(UserError, match="other tasks than classification"):
            Source(Pixels(np.zeros((3, 8, 8, 3), np.uint8)), array, ["a", "b"])


ROWS = [("0.jpg", "cat", "train"), ("1.jpg", "dog", "train"), ("2.jpg", "cat", "val"), ("3.jpg", "dog", "val")]


def listed(rows=ROWS, header=("path", "label", "split"), mark: str = ",") -> str:
    return "\n".join(mark.join(row) for row in (header, *rows)) + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (listed().encode("utf-8-sig"), ""),
        (listed(mark=";"), ""),
        (listed(mark="\t"), ""),
        (listed(header=(" Path", "LABEL ", " split")), ""),
        (listed([(f"in\\{path}", *rest) for path, *rest in ROWS]), ""),
        (listed([(*row[:2], row[2].replace("train", "Training").replace("val", "dev")) for row in ROWS]), ""),
        (listed().encode("utf-16"), "is UTF-16.*iconv"),
        (listed().replace("cat", "cät").encode("latin-1"), "is not UTF-8.*iconv"),
        (listed([('"0.jpg', *ROWS[0][1:]), *ROWS[1:]]), "line 5: .*Close its quotes"),
        (listed([("0.jpg", "cat, grey", "train"), *ROWS[1:]]), "line 2 has 4 values for 3 columns"),
        (listed(header=("path", "label", "label")), "several columns label"),
        (listed([*ROWS, ("0.jpg", "cat", "test")]), "has val and test"),
        (listed([(path, str(int(path[0]) / 4), part) for path, _, part in ROWS]), "column label holds 0.25, a number"),
        (listed([(path, f"{label};round", part) for path, label, part in ROWS]), "label holds 'cat;round', several"),
        (listed([(path, "cat", part) for path, _, part in ROWS]), "has one class, cat"),
    ],
)  # fmt: skip
def test_forms_of_a_csv(tmp_path, text, words):
    for number in range(4):
        write(tmp_path / "in" / f"{number}.jpg", str(number))
        write(tmp_path / f"{number}.jpg", str(number))
    path = write(tmp_path / "list.CSV", text)
    if words:
        with pytest.raises(UserError, match=words):
            open_data(str(path), 0, 0)
        return
    for part, images in zip(open_data(str(path), 0, 0), ((b"0", b"1"), (b"2", b"3")), strict=True):
        assert [(part.classes[label], image) for label, image in images_of(part)] == [
            *zip(("cat", "dog"), images, strict=True)
        ]


def test_columns_of_a_csv_are_chosen(tmp_path):
    rows = [
        (path, label, part, "animal" if number % 3 else "thing") for number, (path, label, part) in enumerate(ROWS)
    ]
    path = write(tmp_path / "list.csv", listed(rows, ("file", "fine", "split", "coarse")))
    write(tmp_path / "0.jpg")
    assert "path,label,split" in refusal(path)
    assert open_data(str(path), 0, 0, 0, "file", "fine")[0].classes == ["cat", "dog"]
    assert open_data(str(path), 0, 0, 0, "file", "coarse")[0].classes == ["animal", "thing"]


# The real commands


def test_a_run_on_other_classes_or_other_images_is_refused(server, tmp_path):
    """Renamed so that the classes change places; then each class's images are the other's, under the same names."""
    data, flags = tmp_path / "data", ["--max_steps", "2", "--global_batch_size", "8", "--image_size", "8"]
    for part in ("train", "val"):
        for label, colour in (("cat", 0), ("dog", 100)):
            for number in range(8):
                write(data / part / label / f"{number}.png", picture((colour + number, 0, 0)))
    words = [*launch_command()[2:], str(ROOT / "recipes/resnet.py"), "--data", str(data), "--report_to", "none"]
    words += ["--output_dir", str(tmp_path / "run"), "--num_workers", "0", *flags]
    assert server.launch(words).returncode == 0
    for part in ("train", "val"):
        (data / part / "cat").rename(data / part / "zebra")
    assert "class_names[0] was cat, is dog" in error_of(server.launch(words))
    for part in ("train", "val"):
        (data / part / "dog").rename(data / part / "cat")
        (data / part / "zebra").rename(data / part / "dog")
    error = error_of(server.launch(words))
    assert "data_fingerprint was " in error
    assert "class_names" not in error
    again = server.launch([*words, "--resume_override", "data_fingerprint", "--max_steps", "3"])
    assert "resumed at step 2" in again.stdout


def test_a_recipe_refuses_two_label_columns_in_one_line(server, tmp_path):
    for part in ("train", "test"):
        table(tmp_path / part / "0.parquet", ["a", "b", "c", "d"], **MORE_LABELS)
    words = [*launch_command()[2:], str(ROOT / "recipes/resnet.py"), "--data", str(tmp_path)]
    assert "--label_column label" in error_of(server.launch([*words, "--output_dir", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()


def error_of(process) -> str:
    assert process.returncode != 0, process.stdout
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("error: ")]
    return line
