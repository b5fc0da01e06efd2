# SPDX-License-Identifier: Apache-2.0
"""The recipe learns, evaluates exactly, and its options do what they say."""

import json
import math
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SHORT, environment, launch_command, train
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from shared.checkpoint import read_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups


def test_the_demonstration_reaches_its_accuracy(demo):
    assert demo.summary["status"] == "finished"
    assert demo.summary["stop_reason"] == "epochs"
    assert demo.summary["accuracy"] >= 0.985
    assert demo.summary["steps"] == 220
    assert demo.summary["samples"] == 220 * 64


def test_the_demonstration_says_where_its_results_are(demo):
    lines = demo.process.stdout.splitlines()
    assert lines[0] == str(demo.folder)
    for name in ("summary.json", "metrics.jsonl", "tensorboard"):
        assert f"  {demo.folder / name}" in lines
        assert (demo.folder / name).exists()
    assert list((demo.folder / "tensorboard").rglob("events.out.tfevents*"))


def test_metrics_have_every_field_once_a_step(demo):
    steps = [line for line in demo.lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 221))
    names, speed = (
        "step epoch samples loss samples_digest learning_rate grad_norm",
        "samples_per_second data_wait_fraction",
    )
    assert set(steps[0]) == set(names.split())  # the first step is no training time
    assert all(set(line) == {*names.split(), *speed.split()} for line in steps[1:])
    assert [line["epoch"] for line in steps] == [step // 22 for step in range(220)]
    assert all(0 <= line["data_wait_fraction"] <= 1 and line["samples_per_second"] > 0 for line in steps[1:])
    assert [line["step"] for line in demo.lines if "accuracy" in line] == list(range(22, 221, 22))


def test_the_configuration_records_what_made_the_run(demo):
    config = demo.config
    assert config["config"]["learning_rate"] == 0.1
    assert torch.__version__.startswith(config["versions"]["torch"])
    assert config["launcher"]["ACCELERATE_MIXED_PRECISION"] == "no"
    assert config["classes"] == list("0123456789")
    assert config["world_size"] == 1
    assert config["threads"] == 1  # the suite's OMP_THREAD_LIMIT, not this machine's cores


def test_evaluation_equals_a_plain_loop_to_the_last_sample(demo):
    """Pixels, weights and loop made again here, from scikit-learn, torchvision and torch."""
    model = resnet18(num_classes=10)
    model.load_state_dict(read_weights(demo.folder / "checkpoints/step-00000220"))
    digits = load_digits()
    images = torch.tensor(np.rint(digits.images * 255 / 16)[::5]).float()[:, None]
    large = torch.nn.functional.interpolate(images, size=32, mode="bilinear").round().expand(-1, 3, -1, -1)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        logits = model.eval()((large - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    labels = torch.tensor(digits.target[::5])
    correct = (logits.argmax(1) == labels).sum().item()
    assert demo.summary["accuracy"] * 360 == pytest.approx(correct, abs=1e-9)
    assert demo.series("eval_loss")[-1] == pytest.approx(cross_entropy(logits, labels).item(), rel=2e-3)


def test_an_image_folder_and_the_other_options(server, runs, image_folder):
    """One launch: folder source, cosine, bf16, channels-last, accumulation, clipping, all trackers, the trace."""
    run = train(
        runs / "options",
        *["--data", str(image_folder), "--image_size", "24", "--global_batch_size", "40", "--epochs", "2"],
        *["--schedule", "cosine", "--warmup_epochs", "1", "--channels_last", "--horizontal_flip"],
        *["--gradient_accumulation_steps", "2", "--max_grad_norm", "0.5", "--logging_steps", "1"],
        *["--report_to", "tensorboard,wandb,mlflow", "--profile"],
        mixed_precision="bf16",
        server=server,
    )
    assert run.config["identity"]["mixed_precision"] == "bf16"
    assert run.config["classes"] == [f"digit-{label}" for label in range(10)]
    assert run.lines[-1]["eval_samples"] == 60
    assert all(math.isfinite(loss) for loss in run.series("loss"))
    rates = [
        min(step / 6, 0.5 * (1 + math.cos(math.pi * (step - 6) / 6))) if step > 6 else step / 6 for step in range(12)
    ]
    assert run.series("learning_rate") == pytest.approx([0.1 * rate for rate in rates])
    assert list(run.folder.rglob("offline-run-*/*.wandb"))
    (losses,) = (run.folder / "mlflow").rglob("metrics/loss")
    assert [float(line.split()[1]) for line in losses.read_text().splitlines()] == run.series("loss")
    trace = json.loads((run.folder / "profile/profile_0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert f"{run.folder}/profile/profile_0.json" in run.text
    assert sum(name == "Optimizer.step#SGD.step" for name in names) == 3
    # A ResNet-18 has 20 convolutions: 3 steps of 2 micro-batches, then 3 evaluation batches of 20.
    assert sum(name == "aten::convolution" for name in names) == (3 * 2 + 3) * 20


def test_two_launchers_are_two_nodes_with_the_same_losses(runs, topologies):
    """One launcher a node, as Slurm starts them; here both nodes are this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    folder = runs / "nodes"
    nodes = []
    for rank in ("0", "1"):
        where = {"num_machines": "2", "machine_rank": rank, "main_process_ip": "localhost", "main_process_port": port}
        command = [*launch_command(2, **where), "recipes/resnet.py", "--output_dir", str(folder), *SHORT]
        command += ["--norm", "group", "--max_grad_norm", "1", "--max_steps", "4"]
        nodes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment()))
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:4]
    assert [line["samples_digest"] for line in lines] == topologies[2, 1].series("samples_digest")[:4]
    np.testing.assert_allclose([line["loss"] for line in lines], topologies[2, 1].series("loss")[:4], rtol=1e-4)


def test_compile_gives_the_losses_of_eager(server, runs, topologies):
    flags = [*SHORT, "--norm", "group", "--max_grad_norm", "1", "--compile", "--max_steps", "4"]
    run = train(runs / "compiled", *flags, server=server)
    np.testing.assert_allclose(run.series("loss"), topologies[1, 1].series("loss")[:4], rtol=1e-4)


def test_clipping_changes_the_training_and_the_norm_is_logged_before_it(topologies, demo):
    assert max(topologies[1, 1].series("grad_norm")) > 1
    assert max(demo.series("grad_norm")) > 0


def test_norms_and_biases_are_not_decayed():
    decayed, rest = parameter_groups(resnet18(), 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(resnet18().parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_norm_is_of_all_gradients_in_any_layout(layout):
    model, accelerator = resnet18(num_classes=10).to(memory_format=layout), Accelerator(cpu=True)
    model.fc.bias.requires_grad_(False)
    model(torch.randn(2, 3, 32, 32).to(memory_format=layout)).square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    expected = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    torch.testing.assert_close(clip_grad_norm(accelerator, model, 0).double(), expected, rtol=1e-5, atol=0)
    for bad in (math.inf, math.nan):
        model.conv1.weight.grad[0, 0, 0, 0] = bad
        assert not clip_grad_norm(accelerator, model, 0).isfinite()


# The pages that eight tensors of 24 MiB, 49,152 pages, map again after equal ones were freed: the least of four times,
# since small allocations between may take a part of what was freed.
FAULTS = """
import resource, torch, resnet
resnet.build_accelerator(0, resnet.Config())
faults = []
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(6 * 2**20) for _ in range(8)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
print(min(faults[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_memory_that_a_step_frees_stays_with_the_process(server, tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    command = [*launch_command()[2:], tmp_path / "faults.py"]
    process = server.launch(command, env=environment())
    assert process.returncode == 0, process.stdout
    assert int(process.stdout.split()[-1]) < 8192, process.stdout


@pytest.mark.parametrize("total_steps", [1, 2, 10])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_any_warmup_gives_a_schedule(name, total_steps, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = build_scheduler(optimizer, name, total_steps, warmup_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert all(0 <= rate <= 0.3 + 1e-9 for rate in rates)
    if total_steps == 10 and warmup_steps < 10:
        assert rates[warmup_steps] == max(rates) == pytest.approx(0.3)
        assert rates[-1] < 0.03
