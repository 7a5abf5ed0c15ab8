"""What computes is chosen in the open: by an option, said in the plan, refused where it cannot be had."""

import copy
import threading

import pytest
import torch
from torch import nn

import schatten
from schatten import kernels
from schatten.batching import MAX_BATCH_BYTES, MAX_GPU_BATCH_BYTES, default_batch_bytes
from schatten.kernels import choice

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU of capability 9.0 and Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choice._lacking_gpu.cache_clear()
    yield
    choice._lacking_gpu.cache_clear()


@pytest.fixture
def plain(monkeypatch):
    """No interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_plan_says_what_computes():
    opt = schatten.Muon(nn.Linear(4, 4))
    assert str(opt.plan).splitlines()[-1] == "kernels: eager (on cpu)"
    assert str(schatten.Muon(nn.Linear(4, 4), kernels="eager").plan).splitlines()[-1] == "kernels: eager (asked for)"
    assert opt.plan == schatten.plan(nn.Linear(4, 4)), "what computes is no part of a plan's identity"


@pytest.mark.parametrize(
    ("devices", "name", "text"),
    [
        ([GPU], "auto", "triton"),
        ([GPU], "triton", "triton"),
        ([GPU], "eager", "eager (asked for)"),
        ([CPU, CPU], "auto", "eager (on cpu)"),
        ([GPU, CPU], "auto", "triton on cuda:0, eager (on cpu)"),
        ([torch.device("mps")], "auto", "eager (on mps)"),
    ],
)
def test_a_back_end_is_named_with_the_reason(hopper, devices, name, text):
    assert choice.described(devices, name) == text


def test_old_rocm_and_bare_machines_are_eager(hopper, monkeypatch):
    for patched, name, value, text in (
        (torch.cuda, "get_device_capability", lambda device: (7, 5), "the device has capability 7.5, below 8.0"),
        (choice, "missing", lambda: "Triton is not installed", "Triton is not installed"),
        (torch.version, "hip", "7.0", "on ROCm"),
    ):
        monkeypatch.setattr(patched, name, value)
        choice._lacking_gpu.cache_clear()
        assert choice.described([GPU], "auto") == f"eager ({text})"


@pytest.mark.parametrize(
    ("found", "text"),
    [("3.3.1", "Triton 3.3.1 is older than 3.6"), ("3.6.0", ""), ("3.10.2+git1a", ""), (None, "Triton is not installed")],
)
def test_an_older_triton_than_was_tried_is_none(monkeypatch, found, text):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None if found is None else object())
    monkeypatch.setattr(choice, "version", lambda name: found)
    choice.missing.cache_clear()
    assert choice.missing() == text
    choice.missing.cache_clear()


def test_triton_is_refused_where_it_cannot_be_had(plain, monkeypatch):
    monkeypatch.setattr(choice, "missing", lambda: "")
    with pytest.raises(ValueError, match=r"kernels='triton' cannot be had here \(on cpu\): leave kernels='auto'"):
        schatten.Muon(nn.Linear(4, 4), kernels="triton")
    monkeypatch.setattr(choice, "missing", lambda: "Triton is not installed")
    with pytest.raises(ValueError, match="kernels='triton' cannot be had, as Triton is not installed: install it"):
        schatten.Muon(nn.Linear(4, 4), kernels="triton")


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 1])
def test_another_name_is_refused(name):
    with pytest.raises(ValueError, match="kernels must be one of 'auto', 'eager', 'triton', got"):
        schatten.SpectralSGD(nn.Linear(4, 4), p=0.5, kernels=name)


def test_a_copy_keeps_the_choice():
    opt = copy.deepcopy(schatten.Muon(nn.Linear(4, 4), kernels="eager"))
    assert opt.kernels == "eager" and "asked for" in str(opt.plan)
    opt.step()


def test_a_block_chooses_for_its_own_thread_alone():
    seen = []
    with kernels.use("eager"):
        thread = threading.Thread(target=lambda: seen.append(choice.lacking(CPU)))
        thread.start()
        thread.join()
        assert choice.lacking(CPU) == "asked for"
    assert seen == ["on cpu"] and choice.lacking(CPU) == "on cpu"


def test_what_autograd_must_see_through_or_takes_more_bits_is_eager(hopper, monkeypatch):
    class OnGPU(torch.Tensor):
        device = GPU

    def asked(dtype, **options):
        return choice.on_triton(X.to(dtype), **options)

    # A tensor that says it is on the GPU; only its type, dtype and device are looked at.
    X = torch.zeros(2, 2).as_subclass(OnGPU)
    monkeypatch.setattr(choice, "Tensor", OnGPU)
    assert asked(torch.bfloat16) and asked(torch.float16) and not asked(torch.float64)
    assert not asked(torch.float32) and asked(torch.float32, products=False)
    assert asked(torch.float32, work=torch.bfloat16)
    X.requires_grad_()
    assert not asked(torch.bfloat16)
    with torch.no_grad():
        assert asked(torch.bfloat16)
    X.requires_grad_(False)
    monkeypatch.setattr(choice, "tf32", lambda: True)
    assert asked(torch.float32)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not asked(torch.bfloat16)


def test_torchs_own_setting_of_tf32_is_read_in_each_of_its_spellings():
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("high", True), ("highest", False), ("medium", True)):
            torch.set_float32_matmul_precision(precision)
            assert choice.tf32() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_gpu_gets_larger_batches_by_default():
    assert default_batch_bytes([CPU]) == MAX_BATCH_BYTES == schatten.Muon(nn.Linear(4, 4)).max_batch_bytes
    assert default_batch_bytes([CPU, GPU]) == MAX_GPU_BATCH_BYTES
    assert schatten.Muon(nn.Linear(4, 4), max_batch_bytes=5).max_batch_bytes == 5
