# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be decoded are named and replaced alike on any topology."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import loading
import numpy as np
import pictures
import pytest
import torch
from conftest import ROOT, python
from loading import loaders_of, words
from PIL import Image

from shared.errors import UserError
from shared.images import Source, open_data, storage
from shared.metrics import Evaluation

surroundings, pack, photographs = loading.surroundings, loading.pack, pictures.photographs


def damage(folder: Path) -> set[str]:
    """Make five images undecodable, each in its own way; return their names."""
    files = sorted(folder.glob("*/*.jpg"))
    files[0].write_bytes(files[0].read_bytes()[:-300])
    files[5].write_bytes(b"\xff\xd8 this is no JPEG")
    files[6].unlink()
    files[6].symlink_to("nowhere.jpg")
    files[7].write_bytes(b"")
    bomb = Image.new("L", (12000, 12000))
    bomb.save(files[8])
    return {str(files[number]) for number in (0, 5, 6, 7, 8)}


def test_undecodable_images_are_named_and_replaced_alike_on_any_topology(photographs, capfd):
    whole = [batch for loader in loaders_of(photographs, batch=8) for batch in loader]
    assert not any(batch.rejected for batch in whole)
    undecodable = damage(photographs / "train") | damage(photographs / "val")
    one = [batch for loader in loaders_of(photographs, batch=8) for batch in loader]
    named = {name.split(": ")[0] for batch in one for name in batch.rejected}
    assert named == undecodable
    said = capfd.readouterr().err
    assert all(f"undecodable image: {name}: " in said for name in undecodable)
    halves = [list(loaders_of(photographs, rank, 2, num_workers=1, batch=8)[0]) for rank in (0, 1)]
    for step, (ours, first, second) in enumerate(zip(one, *halves, strict=False)):
        assert torch.equal(ours.images, torch.cat([first.images, second.images])), step
        assert ours.digest == (first.digest + second.digest) % 2**64
    training = one[:5]
    assert all(batch.valid.all() for batch in training)
    # The five undecodable ones are replaced by their successors in the order, which come twice or three times.
    sound = {int(seed) for batch in whole[:5] for seed in batch.seeds}
    drawn = [int(seed) for batch in training for seed in batch.seeds]
    assert len(set(drawn)) == 35
    assert set(drawn) <= sound
    evaluation = one[5]
    assert evaluation.valid.sum() == 5
    assert (evaluation.labels == -100).sum() == 5


def test_a_run_names_undecodable_images_and_stops_above_a_share(server, photographs, tmp_path):
    damage(photographs / "train")
    flags = ["--data", photographs, "--global_batch_size", "8", "--image_size", "32", "--norm", "group"]
    flags += ["--report_to", "none", "--output_dir", tmp_path / "run", "--epochs"]
    # Its first line would come after the second epoch: it stops before the first one's evaluation.
    process = python(ROOT / "recipes/resnet.py", *flags, "2", "--logging_steps", "100", server=server)
    assert process.returncode == 1
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    shutil.rmtree(tmp_path / "run")
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "of 40 images cannot be decoded" in error
    assert "--max_undecodable" in error
    flags += ["1", "--logging_steps", "1", "--max_undecodable", "0.2"]
    process = python(ROOT / "recipes/resnet.py", *flags, server=server)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("undecodable image: ") == 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["undecodable"] for line in lines if "undecodable" in line][-1] == 5
    assert lines[-1]["eval_samples"] == 10


def test_where_nothing_can_be_decoded_one_line_says_so(tmp_path, monkeypatch):
    names = np.array([b"%d.jpg" % number for number in range(3000)])
    nothing = Source(storage.Files(str(tmp_path), names), np.zeros(3000, dtype=np.int64), ["a", "b"])
    monkeypatch.setattr(loading, "open_data", lambda *_: (nothing, nothing))
    for num_workers in (0, 1):  # a worker's error comes with its traceback
        with pytest.raises(UserError) as caught:
            list(loaders_of("nothing", num_workers=num_workers)[0])
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"2000 images in a row cannot be decoded, such as {tmp_path}/")
    evaluation = Evaluation()
    for batch in loaders_of("nothing")[1]:
        evaluation.add(torch.zeros(len(batch.labels), 2), batch.labels, batch.valid)
    with pytest.raises(UserError, match="none of 3000 held-out images can be decoded"):
        evaluation.result(SimpleNamespace(mesh=None), 3000)


@pytest.mark.slow
def test_a_shard_that_was_cut_off(pack, tmp_path, capfd):
    pack.main(words(pack, "digits", tmp_path / "tar", "--format", "tar", "--shard_size", "1000"))
    shard = tmp_path / "tar/train/000001.tar"
    whole = open_data(str(tmp_path / "tar"), 0, 0)[0]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    undecodable = [name for batch in loaders_of(tmp_path / "tar")[0] for name in batch.rejected]
    assert len(set(undecodable)) == len(undecodable)
    lost = (whole.images.index.shard == 1) & (whole.images.index.offset > shard.stat().st_size)
    assert lost.sum() - 29 <= len(undecodable) <= lost.sum() + 1  # the last 29 of the epoch are not drawn
    assert all("000001.tar" in name and "too early" in name for name in undecodable)
    (tmp_path / "tar/train/index.safetensors").unlink()  # like another program's: what was cut off has no header
    (tmp_path / "tar/train/000002.tar").write_bytes(b"")
    (tmp_path / "tar/train/000003.tar").write_bytes(b"no header" * 1000)
    for _ in range(2):  # the second time from the cache
        capfd.readouterr()
        assert 0 <= len(open_data(str(tmp_path / "tar"), 0, 0)[0]) - (1437 - lost.sum()) <= 1
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("truncated shard: ")]
        assert [line.split()[2] for line in said] == [str(shard.with_name(f"00000{n}.tar")) for n in (1, 2, 3)]


def test_a_csv_whose_paths_climb_out(photographs):
    rows = [f"{path.relative_to(photographs)},{path.parent.name},train" for path in photographs.glob("train/*/*.jpg")]
    held_out = [f"{row.rsplit(',', 1)[0]},val" for row in (rows[0], rows[-1])]
    table = ["path,label,split", *rows, *held_out, "../../etc/x.jpg,a,val"]
    (photographs / "list.csv").write_text("\n".join(table))
    (batch,) = loaders_of(photographs / "list.csv", batch=8)[1]
    assert ["climbs out" in name for name in batch.rejected] == [True]
