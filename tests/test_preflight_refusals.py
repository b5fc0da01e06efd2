# SPDX-License-Identifier: Apache-2.0
"""Check that tools/preflight.py refuses in one line each what cannot work: commands, topologies, options of sbatch."""

from pathlib import Path

import preflights
import pytest
import yaml
from conftest import ROOT
from preflights import VIT, sound

login_node, run, collection = preflights.login_node, preflights.run, preflights.collection
TP = "--nodes 2 -A abc@h100 -- recipes/vit_tp.py"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("h100", "machine, strategy and recipe are needed"),
        (f"h10 ddp {VIT}", "no machine h10. The nearest is h100; there are v100, v100x8, a100, h100"),
        (f"h100 fsp {VIT}", "h100 has no strategy fsp. The nearest is fsdp; there are ddp, fsdp,"),
        ("v100 tp -A abc@v100 -- recipes/vit_tp.py", "v100 has no strategy tp."),
        ("h100 ddp -A abc@h100 -- recipes/vti.py", "no recipe recipes/vti.py. Give its path; the nearest is"),
        ("h100 ddp -A abc@h100 -- tools/smoke.py", "is no recipe: it has no CONFIGS or no parse"),
        ("h100 fsdp -A abc@h100 -- recipes/resnet.py", "resnet.py does not run under fsdp. Give ddp."),
        ("h100 tp -A abc@h100 -- recipes/vit.py", "vit.py does not run under tp. Give ddp or fsdp or"),
        ("h100 ddp --nodes 1-4 " + VIT, "--nodes 1-4 is not a single number."),
        ("h100 ddp --gres=gpu:8 " + VIT, "exceeds a node of h100. Give --gres=gpu:N, with N from 1 to 4."),
        ("h100 ddp --gres=lscratch:10 " + VIT, "--gres=lscratch:10 gives no GPU of h100. Give --gres=gpu:N,"),
        ("h100 ddp --tim 10 " + VIT, "sbatch has no option --tim in full. The nearest is --time."),
        ("h100 ddp --nodez=2 " + VIT, "sbatch has no option --nodez in full. The nearest is --nodes."),
        ("h100 ddp 4 " + VIT, "4 belongs to no option of sbatch. The recipe and its flags come after --."),
        ("h100 ddp --nodes " + VIT, "sbatch's argument -N/--nodes: expected one argument."),
        ("h100 ddp --time soon " + VIT, "--time soon is not a Slurm time."),
        (f"h100 ddp {VIT} --lr 1", "unknown flag --lr. The nearest is --learning_rate"),
        (
            f"h100 ddp --nodes 4 {VIT} --global_batch_size 1000",
            "1000 does not divide by 16 data-parallel processes x 1 accumulation steps. Give 992 or 1008.",
        ),
        (f"h100 ddp {VIT} --global_batch_size 4096", "1437 training samples do not fill one global batch."),
        (f"h100 ddp {VIT} --train_images 100 --global_batch_size 128", "100 training samples do not fill one"),
        (
            "h100 ddp -A abc@h100 -- recipes/resnet_webdataset.py --train_images 9 --data digits",
            "--train_images has no effect: streams read whole shards.",
        ),
        (f"h100 ddp {VIT} --train_images 2000", "--train_images 2000 is more than the 1437 that there are."),
        (f"h100 tp {TP} --tensor_parallel_size 3", "3 does not fit into a node of 4 GPUs. Give a divisor of 4."),
        (f"h100 tp {TP} --tensor_parallel_size 8", "--tensor_parallel_size 8 does not fit into a node of 4 GPUs."),
        (f"h100 tp {TP} --model Ti --tensor_parallel_size 4", "4 does not divide the 3 heads."),
        (
            "h100 tp -A abc@h100 -- recipes/vit_tp_by_hand.py --model Ti",
            "--tensor_parallel_size 2 does not cut 3 heads",
        ),
        (
            "h100 pp --nodes 2 -A abc@h100 -- recipes/vit_pp.py --pipeline_parallel_size 3",
            "--pipeline_parallel_size 3 does not divide the 8 GPUs (2 nodes x 4). Change it or --nodes.",
        ),
        ("h100 pp --nodes 2 -A abc@h100 -- recipes/vit_pp.py --pipeline_parallel_size 8", "8 exceeds the 6 blocks."),
        (f"h100 hsdp {VIT}", "there is one. Use fsdp, or give more --nodes."),
        ("h100 ddp -- recipes/vit.py", "no account is given. Add -A PROJECT@h100."),
        ("h100 ddp -A abc@v100 -- recipes/vit.py", "the account abc@v100 has no hours on h100."),
        (f"h100 ddp -C v100-32g {VIT}", "--constraint v100-32g does not select h100. Give -C h100."),
        ("v100x8 ddp -p gpu_p13 -A abc@v100 -- recipes/vit.py", "does not select v100x8. Give -p gpu_p2."),
        ("v100 ddp -C a100 -A abc@v100 -- recipes/vit.py", "--constraint a100 selects a100, not v100. Leave it out,"),
        ("v100 ddp -p gpu_p2 -A abc@v100 -- recipes/vit.py", "--partition gpu_p2 selects v100x8, not v100."),
        (f"h100 ddp -p gpu_p5 {VIT}", "--partition gpu_p5 selects a100, not h100. Leave it out, or name"),
        (f"h100 ddp --time 30:00:00 {VIT}",
         "exceeds the 20 h of qos_gpu_h100-t3, the default QoS. Give --qos=qos_gpu_h100-t4,"),
        ("v100 ddp -N 129 -A abc@v100 -- recipes/vit.py --global_batch_size 516",
         "516 GPUs exceed the 512 of qos_gpu-t3, the default QoS. Give fewer --nodes,"),
        (f"h100 ddp -N 8 --time 30:00:00 {VIT}", "default QoS. Give a shorter --time: a job that is cut off resumes,"),
        ("a100 ddp --time 21:00:00 -A abc@a100 -- recipes/vit.py", "--time 21:00:00 exceeds the 20 h of a100."),
        (f"h100 ddp -t 5:00:00 --qos qos_gpu_h100-dev {VIT}", "2 h of qos_gpu_h100-dev. Give --qos=qos_gpu_h100-t3,"),
        (
            "v100 ddp -N 16 --qos=qos_gpu-dev -A abc@v100 -- recipes/vit.py",
            "64 GPUs exceed the 32 of qos_gpu-dev. Give --qos=qos_gpu-t3, fewer --nodes,",
        ),
        (f"h100 ddp --qos=qos_gpu-dev {VIT}", "no QoS qos_gpu-dev of h100 is known. The nearest is qos_gpu_h100-dev,"),
        (f"h100 ddp {VIT} --data $DSDIR/imagenet", "$DSDIR is not set, and $DSDIR/imagenet needs it."),
        (f"h100 ddp {VIT} --data /imagenet", "or a CSV file. $DSDIR is not set: log in again, or export it."),
        (f"h100 ddp {VIT} --report_to aim", "--report_to aim is not installed."),
        (f"h100 ddp {VIT} --checkpointing_steps daily", "--checkpointing_steps daily is neither the word epoch nor"),
        (f"h100 zero2 {VIT} --async_checkpoint", "Leave --async_checkpoint out under ZeRO."),
        (f"h100 ddp {VIT} @sweep.txt", "needs a line of flags for each task of an array. Give --array=1-N."),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_refusals(run, command, words):
    job = run(command)
    assert job.status == 1
    assert any(words in line for line in job.errors), job.errors
    assert all(line.startswith("error: ") and line.endswith(".") for line in job.errors), job.errors
    assert job.out == ""


def test_several_problems_come_at_once(run):
    job = run("h100", "hsdp", "--qos=dev", "--", "recipes/vit.py", "--global_batch_size", "66", "--data", "no/such")
    decisive = [
        "no account is given",
        "no QoS dev",
        "hsdp replicates",
        "does not divide by 4",
        "no/such does not exist",
    ]
    assert [sum(word in line for line in job.errors) for word in decisive] == [1] * 5, job.errors


def test_checks_that_rest_on_hearsay_can_be_left_out(run, monkeypatch):
    command = f"h100 ddp --qos=qos_new {VIT}"
    assert run(command).status == 1
    monkeypatch.setenv("RECIPES_PREFLIGHT_SKIP", "limits,quotas")
    assert run(command).rows["qos"] == ("qos_new", "command line")


# Topologies that somebody changed


@pytest.mark.parametrize(
    ("machine", "strategy", "change", "words"),
    [
        ("v100", "ddp", {"mixed_precision": "bf16"}, "v100 has no bf16 in hardware. Set mixed_precision to fp16"),
        ("v100", "ddp", {"mixed_precision": "fp8"}, "v100 has no fp8 in hardware. Set mixed_precision to fp16"),
        ("a100", "ddp", {"mixed_precision": "fp8"}, "a100 has no fp8 in hardware. Set mixed_precision to bf"),
        ("h100", "ddp", {"rdzv_backend": "c10d"}, "rdzv_backend is set in accelerate_configs/h100_ddp.yaml: acc"),
        ("h100", "ddp", {"same_network": True}, "same_network is set in"),
        ("h100", "ddp", {"enable_cpu_affinity": True}, "enable_cpu_affinity is set in"),
        ("h100", "ddp", {"max_restarts": 1}, "max_restarts is set in"),
        ("h100", "ddp", {"use_cpu": True}, "use_cpu is set in"),
        ("h100", "ddp", {"num_machines": 2}, "num_machines is set in accelerate_configs/h100_ddp.yaml: Slurm and"),
        ("h100", "ddp", {"machine_rank": 0}, "machine_rank is set in"),
        ("h100", "ddp", {"main_process_ip": "x"}, "main_process_ip is set in"),
        ("h100", "ddp", {"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps sets it. Remove it."),
        ("h100", "zero3", {"deepspeed_config": {"gradient_clipping": 1.0}}, "recipe's --max_grad_norm sets it."),
        ("h100", "ddp", {"mixed_precison": "no"}, "h100_ddp.yaml. The nearest is mixed_precision."),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_ofload_params": True}}, "The nearest is fsdp_offload_params."),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_version": 1}}, "Set fsdp_version: 2"),
        (
            "h100", "fsdp", {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "ViTLayer"}},
            "no module of vit.py's model is a ViTLayer, fsdp_transformer_layer_cls_to_wrap of",
        ),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": None}}, "The nearest is "),
    ],
    ids=str,
)  # fmt: skip
def test_topologies_that_do_not_do_what_they_say(run, collection, machine, strategy, change, words):
    path = collection / f"accelerate_configs/{machine}_{strategy}.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in change.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(settings))
    job = run(*sound(machine, strategy, "vit"))
    (line,) = job.errors
    assert words in line
    assert job.status == 1


# Options of sbatch that change what is launched


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--ntasks-per-node=4",
            "--ntasks-per-node=4 (command line) starts several launchers on a node. Leave it out:",
        ),
        ("--ntasks-per-node 2", "starts several launchers on a node."),
        ("--ntasks-per-gpu=1", "starts several launchers on a node."),
        ("-n 8", "--ntasks=8 is not the 2 that the other options ask for. Give --nodes=N alone."),
        ("--ntasks=8", "--ntasks=8 is not the 2"),
        ("-n8", "--ntasks=8 is not the 2"),
        ("-G 4", "--gpus=4 is not the 8 that the other options ask for. Give --nodes=N and --gres=gpu:N,"),
        ("--gpus=h100:4", "--gpus=h100:4 is not the 8"),
        ("--gpus-per-node=2", "--gpus-per-node=2 is not the 4 that the other options ask for."),
        ("--gpus-per-task=1", "gives the launcher of a node other GPUs than --gres. Give --gres=gpu:N,"),
        ("--gpus-per-socket 2", "gives a node other GPUs than --gres."),
        ("--gpu-bind=single:1", "hides GPUs of a node from its launcher."),
        ("--tres-bind=gres/gpu:map:0", "hides GPUs of a node from its launcher."),
        ("--cpus-per-gpu=8", "excludes --cpus-per-task. Give --cpus-per-task,"),
        ("-c 97", "--cpus-per-task=97 does not fit into the 96 cores of a node. Give at most 96."),
        ("--cpus-per-task=all", "--cpus-per-task=all does not fit into the 96 cores"),
        ("--export=NONE", "--export=NONE (command line) leaves your environment behind. Give --export=ALL,"),
        ("--export RECIPES_ROOT,PATH", "leaves your environment behind."),
        ("-m arbitrary", "--distribution=arbitrary (command line) changes the order of the nodes."),
        ("--open-mode=truncate", "loses what the former starts of a job wrote."),
        ("--signal=TERM@60", "ends a job in another way than by a checkpoint and a requeue. Give --signal=B:USR1@SEC"),
        ("--container=/image", "runs slurm/launch.sh where there is no srun."),
        (
            "--mem=64G",
            "--mem=64G: Jean Zay gives a job memory with its cores. Leave it out, and give --cpus-per-task,",
        ),
        ("--mem-per-cpu 4G", "--mem-per-cpu=4G: Jean Zay gives a job memory with its cores."),
        ("-D no/such", "--chdir=no/such is not a folder."),
        ("--chdir=recipes", "no recipe recipes/resnet.py"),  # sbatch starts the job there
        ("-o no/such/%x-%j.log", "--output=no/such/%x-%j.log (command line) is not in an existing folder, and"),
        ("--error no/such.txt/%j", "--error=no/such.txt/%j (command line) is not in an existing folder"),
        ("--output=slurm/", "--output=slurm/ (command line) is not in an existing folder"),
        ("--output=%j/log", "--output=%j/log (command line) is not in an existing folder"),
        ("--job-name=a/b", "--output=%x-%j.log (slurm/h100.slurm) is not in an existing folder"),
    ],
)
def test_options_that_change_what_is_launched_are_refused(run, options, words):
    job = run(f"h100 ddp --nodes=2 -A abc@h100 {options} -- recipes/resnet.py --data=digits")
    assert job.status == 1
    assert len(job.errors) == 1, job.errors
    assert words in job.errors[0]


def test_the_same_by_variables(run, monkeypatch):
    words = sound("h100", "ddp", "resnet")
    values = {"EXPORT": "NONE", "GPU_BIND": "single:1", "GPUS_PER_TASK": "1", "OUTPUT": "no/log", "SIGNAL": "KILL"}
    values |= {"MEM_PER_NODE": "9G", "OPEN_MODE": "truncate", "GPUS": "1", "DISTRIBUTION": "arbitrary"}
    for name, value in values.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
        (line,) = run(*words).errors
        assert f"={value}" in line
        monkeypatch.delenv(f"SBATCH_{name}")
    # Those that a job or a step leaves in its shell are not sbatch's; slurm/launch.sh takes them away from srun.
    for name in ("EXPORT_ENV=NONE", "NTASKS_PER_NODE=4", "GPUS_PER_TASK=1", "CPUS_PER_TASK=1", "NTASKS=1"):
        monkeypatch.setenv(f"SLURM_{name.split('=')[0]}", name.split("=")[1])
    assert run(*words).status == 0


def test_options_that_change_nothing_pass(run, tmp_path, monkeypatch):
    (tmp_path / "logs h100").mkdir()
    harmless = ["--ntasks=2", "--ntasks-per-node=1", "-G", "8", "--gpus-per-node=h100:4", "-m", "block", "-c", "96"]
    harmless += ["--export=ALL,A=1", "--open-mode=append", "--signal=B:USR2@90", "--gpu-bind=none", "--mem=0"]
    harmless += ["--output", f"{tmp_path}/logs %x/%%%j.log", "--job-name=h100", "--hint=nomultithread", "--hold"]
    words = sound("h100", "ddp", "resnet")
    assert run(*words[:2], *harmless, *words[2:]).errors == []
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for where in (["-D", str(tmp_path)], [f"--chdir={tmp_path}"]):
        monkeypatch.chdir(ROOT)
        job = run("h100", "ddp", *where, "-A", "abc@h100", "--", "recipes/resnet.py")
        assert job.errors == []
        assert Path.cwd() == tmp_path  # where everything else was looked for
    job = run(*words[:2], "--cpus-per-task=24", *words[2:])
    assert "warning: --cpus-per-task=24 is for all 4 processes of a node, whose share is 96 cores. Give" in job.out
    assert "warning" not in run(*words[:2], "--cpus-per-task=24", "--gres=gpu:1", *words[2:]).out


def test_in_a_job_more_than_one_task_on_a_node_is_refused(run, monkeypatch):
    """Their cores are shared out: the one launcher would get a part of them."""
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SBATCH_OUTPUT", "no/such/log")
    monkeypatch.setenv("SBATCH_GPU_BIND", "single:1")
    (line,) = run("h100", "ddp", "--in_job", "--", "recipes/resnet.py").errors
    assert "--ntasks-per-node=4 ($SLURM_NTASKS_PER_NODE) starts several launchers on a node." in line
