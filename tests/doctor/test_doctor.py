"""Each diagnosis is a function of facts; the facts of a good machine are changed one at a time."""

import json
import subprocess
import sys

import pytest

from lowmem.doctor.diagnoses import diagnose
from lowmem.doctor.facts import DriverCard, Facts, gather_facts, memory_limit_bytes, quota_cores
from lowmem.machine import Card, Machine
from lowmem.sizes import GIB, MIB

CARD = Card(index=0, name="NVIDIA GeForce RTX 4060 Laptop GPU", total_bytes=8 * GIB, capability=(8, 9), driver="570.10")
DRIVER_CARD = DriverCard(name=CARD.name, driver="570.10", total_bytes=8 * GIB, free_bytes=int(7.6 * GIB))
MACHINE = Machine(
    system="Linux",
    processor="x",
    cores=8,
    ram_bytes=32 * GIB,
    python="3.12",
    packages={"pillow": "13.0.0"},
    cards=(CARD,),
)
WDDM = DRIVER_CARD.model_copy(update={"display_model": "WDDM"})
GOOD = Facts(
    machine=MACHINE, windows=False, wsl=False, torch_version="2.14.1+cu130", torch_cuda="13.0",
    torch_architectures=("sm_75", "sm_86", "sm_90", "compute_120"), driver_cards=(DRIVER_CARD,), environment={},
    allocator_settings="expandable_segments:True", torch_threads=8, logical_cores=8, quota_cores=None, busy_frac=0.1,
    ram_available_bytes=24 * GIB, ram_limit_bytes=None, shm_bytes=16 * GIB, disk_free_bytes=100 * GIB,
    disk_path="/runs", jpeg_turbo="3.1.0", bf16_in_hardware=False,
)  # fmt: skip


def changed(**changes):
    machine = {name: changes.pop(name) for name in ("cards", "cores", "packages") if name in changes}
    return GOOD.model_copy(update={"machine": MACHINE.model_copy(update=machine), **changes})


def windows(driver, **changes):
    card = WDDM.model_copy(update={"driver": driver})
    return changed(windows=True, allocator_settings="", driver_cards=(card,), **changes)


def card_of(name, capability):
    return (CARD.model_copy(update={"name": name, "capability": capability}),)


def finding(topic, facts):
    return next(found for found in diagnose(facts) if found.topic == topic)


def test_a_good_machine_has_nothing_to_be_said_about():
    assert {found.verdict for found in diagnose(GOOD)} == {"ok"} and not any(found.fix for found in diagnose(GOOD))


@pytest.mark.parametrize(
    "topic, verdict, facts, said",
    [
        ("torch", "problem", changed(torch_version="2.9.0"), "pip install --upgrade torch"),
        ("GPU", "could be better", changed(cards=(), driver_cards=()), "no NVIDIA card"),
        ("GPU", "problem", changed(cards=(), torch_cuda=None), "--index-url"),
        ("GPU", "problem", changed(cards=(), environment={"CUDA_VISIBLE_DEVICES": ""}), "unset CUDA_VISIBLE_DEVICES"),
        ("GPU", "problem", changed(cards=()), "update the driver"),
        ("arithmetic", "ok", changed(cards=card_of("Tesla T4", (7, 5))), "fp16 with loss scaling"),
        ("arithmetic", "could be better", changed(cards=card_of("GTX 1080", (6, 1))), "no tensor cores"),
        ("arithmetic", "could be better", changed(cards=(), bf16_in_hardware=True), "amp=bf16"),
        ("kernels", "problem", changed(cards=card_of("GTX 1080", (6, 1))), "no kernels"),
        ("kernels", "ok", changed(cards=card_of("RTX 5090", (12, 0))), "has kernels"),
        ("free memory", "could be better", changed(driver_cards=(DRIVER_CARD.model_copy(update={"free_bytes": 5 * GIB}),)), "nvidia-smi"),
        ("allocator", "problem", changed(environment={"PYTORCH_ALLOC_CONF": "x"}, allocator_settings="backend:cudaMallocAsync"), "unset PYTORCH_ALLOC_CONF"),
        ("allocator", "could be better", changed(environment={"PYTORCH_CUDA_ALLOC_CONF": "x"}, allocator_settings="max_split_size_mb:64"), "unset PYTORCH_CUDA_ALLOC_CONF"),
        ("allocator", "could be better", windows("570.10").model_copy(update={"allocator_settings": "expandable_segments:True", "environment": {"PYTORCH_ALLOC_CONF": ""}}), "set PYTORCH_ALLOC_CONF="),
        ("allocator", "ok", windows("570.10"), "Windows"),
        ("spilling", "could be better", windows("570.10"), "Prefer No Sysmem Fallback"),
        ("spilling", "could be better", windows("537.58"), "update the driver"),
        ("spilling", "ok", windows("531.14"), "does not spill"),
        ("spilling", "ok", changed(windows=True, driver_cards=(DRIVER_CARD.model_copy(update={"display_model": "TCC"}),)), "does not spill"),
        ("spilling", "could be better", changed(wsl=True), "1G less"),
        ("launches", "could be better", changed(environment={"CUDA_LAUNCH_BLOCKING": "1"}), "unset CUDA_LAUNCH_BLOCKING"),
        ("cores", "could be better", changed(quota_cores=2.0), "OMP_NUM_THREADS=2"),
        ("cores", "could be better", changed(cores=1), "share it"),
        ("cores", "could be better", changed(cores=3), "taskset"),
        ("threads", "could be better", changed(cores=2), "OMP_NUM_THREADS=2"),
        ("threads", "could be better", changed(cards=(), torch_threads=1, environment={"OMP_NUM_THREADS": "1"}), "unset OMP_NUM_THREADS"),
        ("OpenMP", "could be better", changed(environment={"OMP_WAIT_POLICY": "ACTIVE"}), "unset OMP_WAIT_POLICY"),
        ("OpenMP", "could be better", changed(environment={"GOMP_CPU_AFFINITY": "0-3"}), "unset GOMP_CPU_AFFINITY"),
        ("load", "could be better", changed(busy_frac=0.9), "close other programs"),
        ("host memory", "problem", changed(ram_available_bytes=GIB // 2), "too little"),
        ("host memory", "could be better", changed(ram_limit_bytes=2 * GIB), "a container's limit"),
        ("shared memory", "could be better", changed(shm_bytes=64 * MIB), "--shm-size"),
        ("shared memory", "ok", changed(shm_bytes=None), "no limit"),
        ("disk", "problem", changed(disk_free_bytes=GIB // 2), "make room"),
        ("disk", "could be better", changed(disk_free_bytes=3 * GIB), "--out"),
        ("images", "could be better", changed(jpeg_turbo=None), "pip install --force-reinstall pillow"),
        ("images", "ok", changed(packages={"pillow-simd": "12.1.1"}), "pillow-simd 12.1.1"),
    ],
)  # fmt: skip
def test_each_fact_changes_its_own_finding(topic, verdict, facts, said):
    found = finding(topic, facts)
    assert found.verdict == verdict and said in f"{found.what} {found.fix}"
    assert found.verdict == "ok" or found.fix


def test_limits_of_containers_are_read(tmp_path):
    assert quota_cores(tmp_path) is None and memory_limit_bytes(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert quota_cores(tmp_path) == 1.5 and memory_limit_bytes(tmp_path) == GIB
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert quota_cores(tmp_path) is None and memory_limit_bytes(tmp_path) is None


def test_this_machine_is_looked_at(tmp_path):
    facts = gather_facts(tmp_path, {"OMP_NUM_THREADS": "1", "HOME": "/root"})
    assert facts.environment == {"OMP_NUM_THREADS": "1"} and facts.disk_path == str(tmp_path)
    assert facts.machine.cores >= 1 and facts.disk_free_bytes > 0 and facts.ram_available_bytes > 0
    assert Facts.model_validate_json(facts.model_dump_json()) == facts


def test_the_command_says_it_as_json_and_by_its_exit_code():
    command = [sys.executable, "-m", "lowmem", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    told = json.loads(done.stdout)
    problems = [found for found in told["findings"] if found["verdict"] == "problem"]
    assert done.returncode == (1 if problems else 0), done.stderr
    assert told["facts"]["torch_version"] and len(told["findings"]) >= 10
