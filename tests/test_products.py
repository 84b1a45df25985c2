"""Products: the same values whichever library multiplies."""

import ctypes
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from flexlora import processor, products
from flexlora.processor import leaves_avx512_unused, made_by_intel
from flexlora.products import gram, mm

served = pytest.mark.skipif(not products._SERVED, reason="torch's own library multiplies on this processor")
sizes = st.integers(1, 80)


@given(n=sizes, k=sizes, m=sizes, dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9))
def test_product_of_any_layout(n: int, k: int, m: int, dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, k, generator=g, dtype=dtype), torch.randn(k, m, generator=g, dtype=dtype)
    expected = (a.double() @ b.double()).to(dtype)
    wide = torch.randn(k, 2 * m, generator=g, dtype=dtype)
    wide[:, ::2] = b
    for x, y in [(a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T), (a, wide[:, ::2])]:
        before = x.clone(), y.clone()
        torch.testing.assert_close(mm(x, y), expected, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


@pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN")
@given(n=sizes, k=sizes, m=sizes, seed=st.integers(0, 9))
def test_onednn_stands_in_for_any_layout(n: int, k: int, m: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, k, generator=g), torch.randn(k, m, generator=g)
    wide, tall = torch.randn(k, 2 * m, generator=g), torch.randn(n, k + 3, generator=g)
    wide[:, ::2], tall[:, :k] = b, a
    for x, y in [
        (a, b),
        (a.T.contiguous().T, b),
        (a, b.T.contiguous().T),
        (a.T.contiguous().T, b.T.contiguous().T),
        (tall[:, :k], wide[:, ::2]),
        (a[:1].expand(n, k), b[:, :1].expand(k, m)),
    ]:
        before = x.clone(), y.clone()
        found = products._onednn_mm(x, y)
        assert found.is_contiguous()
        torch.testing.assert_close(found, (x.double() @ y.double()).float(), atol=1e-4, rtol=0)
        assert torch.equal(x, before[0])
        assert torch.equal(y, before[1])


def test_onednn_stands_in_for_large_products_where_no_other_library_uses_avx512(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []
    monkeypatch.setattr(products, "_onednn_mm", lambda a, b: done.append(a.shape[0]) or a @ b)
    monkeypatch.setattr(products, "_SLEEP", True)
    torch.set_num_threads(2)
    a, b = torch.randn(1024, 64), torch.randn(64, 64)
    cases: tuple[tuple[bool, bool, bool, torch.dtype, int, bool], ...] = (
        (True, True, False, torch.float32, 1024, True),
        (True, False, False, torch.float32, 1024, True),
        (True, True, False, torch.float32, 128, False),  # a small one
        (True, True, False, torch.float64, 1024, False),
        (True, True, True, torch.float32, 1024, False),  # OpenBLAS uses it
        (True, False, True, torch.float32, 1024, True),  # and does not multiply
        (False, True, False, torch.float32, 1024, False),
    )
    for stands_in, openblas, broad, dtype, rows, asked in cases:
        done.clear()
        monkeypatch.setattr(products, "_STANDS_IN", stands_in)
        monkeypatch.setattr(products, "_SERVED", openblas)
        monkeypatch.setattr(products, "_BROAD", broad)
        x, y = a[:rows].to(dtype), b.to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(mm(x, y), x @ y)
        assert bool(done) == asked, (stands_in, openblas, broad, dtype, rows)


@served
def test_few_decoded_rows_go_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(products, "_onednn_mm", lambda a, b: done.append(a.shape[0]) or a @ b)
    for name in ("_STANDS_IN", "_BROAD", "_SLEEP"):
        monkeypatch.setattr(products, name, True)
    w = torch.randn(512, 128).T
    for rows in (8, products.FEW, products.FEW + 1):
        with torch.no_grad():
            mm(torch.ones(rows, 128), w)
        with torch.inference_mode():
            mm(torch.ones(rows, 128), w)
    assert done == [products.FEW]  # eight have too few multiplications


def test_processors_whose_avx512_mkl_leaves_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, unused in (
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f avx512bw", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", False),
        ("", False),
    ):
        monkeypatch.setattr("flexlora.processor._described", lambda said=said: said)
        assert leaves_avx512_unused() == unused


def test_threads_wait_as_they_come_where_nothing_else_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, theirs in (
        ("vendor_id : AuthenticAMD", False),
        ("vendor_id : GenuineIntel", True),
        ("CPU implementer : 0x41", True),  # ARM
        ("", True),
    ):
        monkeypatch.setattr("flexlora.processor._described", lambda said=said: said)
        assert made_by_intel() == theirs


@served
@pytest.mark.parametrize(("core", "broad"), [("Haswell", False), ("SkylakeX", True)])
def test_what_openblas_uses_is_found_out(core: str, broad: bool) -> None:
    if broad and not leaves_avx512_unused():
        pytest.skip("no AVX-512")
    code = "from flexlora import products; print(products._BROAD)"
    environment = os.environ | {"OPENBLAS_CORETYPE": core}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(broad)


@given(n=st.integers(1, 600), k=sizes, seed=st.integers(0, 9))
def test_gram_is_symmetric_to_the_bit(n: int, k: int, seed: int) -> None:
    a = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    G = gram(a)
    assert torch.equal(G, G.T)
    torch.testing.assert_close(G, (a.double() @ a.double().T).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_with_torch(dtype: torch.dtype) -> None:
    a = torch.ones(64, 64, dtype=dtype)
    assert mm(a, a).dtype == dtype
    assert torch.equal(mm(a, a), torch.full((64, 64), 64, dtype=dtype))


def test_torchs_own_products_lie_in_memory_that_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SERVED", False)
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(70, 60, generator=draw), torch.randn(50, 60, generator=draw).T
    with torch.no_grad():
        y = mm(a, b)
    assert torch.equal(y, a @ b)
    assert not y.untyped_storage().resizable(), "torch did not allocate it"
    mm(a.requires_grad_(), b).sum().backward()  # recorded where gradients are
    assert a.grad is not None
    torch.testing.assert_close(a.grad, b.sum(1).expand(70, 60))
    assert mm(torch.zeros(0, 60), b).shape == (0, 50)


def test_shapes_alone_multiply_too() -> None:
    with FakeTensorMode():
        assert mm(torch.empty(100, 200), torch.empty(200, 300)).shape == (100, 300)


@served
@pytest.mark.parametrize("shape", [(700, 150, 90), (90, 150, 700), (1, 3000, 3001), (129, 257, 257)])
def test_threads_share_a_product(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, m = shape
    a, b = torch.randn(n, k, dtype=torch.float64), torch.randn(m, k, dtype=torch.float64).T
    expected = a @ b
    monkeypatch.setattr(products, "_SLEEP", True)
    monkeypatch.setattr(products, "PIECE", 2**16)
    calls = []
    multiply = np.matmul
    monkeypatch.setattr(np, "matmul", lambda x, y, *out: calls.append((x.shape[0], y.shape[1])) or multiply(x, y, *out))
    torch.set_num_threads(3)
    found = mm(a, b)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert len(calls) == 3
    assert sum(x * y for x, y in calls) == n * m


@served
def test_where_idle_threads_spin_torch_multiplies_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SLEEP", False)
    monkeypatch.setattr(np, "matmul", lambda *_: pytest.fail("NumPy was asked"))
    torch.set_num_threads(2)
    assert torch.equal(mm(torch.ones(64, 64), torch.ones(64, 64)), torch.full((64, 64), 64.0))


@served
def test_flexlora_lets_idle_threads_sleep_soon_unless_told_otherwise() -> None:
    code = "import flexlora, os; print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    told: tuple[tuple[dict[str, str], str], ...] = (
        ({}, "PASSIVE 2000"),
        ({"GOMP_SPINCOUNT": "7"}, "PASSIVE 7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
    )
    for more, expected in told:
        environment = {k: v for k, v in os.environ.items() if k not in names} | more
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_onednn_keeps_few_products_compiled_unless_told_otherwise() -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    code = f"import flexlora, os; print(os.environ.get('{name}'))"
    for before, more, expected in (("", {}, "48"), ("", {name: "7"}, "7"), ("import torch; ", {}, "None")):
        environment = {k: v for k, v in os.environ.items() if k != name} | more
        done = subprocess.run([sys.executable, "-c", before + code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


HEAPS = """
import ctypes, importlib.util, sys, threading
# The module alone: the package would settle by this processor, and load torch.
spec = importlib.util.spec_from_file_location("processor", sys.argv[2])
processor = importlib.util.module_from_spec(spec)
spec.loader.exec_module(processor)
processor._described = lambda: sys.argv[1]
processor.settle()
ready = threading.Barrier(4)
def work():
    kept = bytearray(5000)
    ready.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
@pytest.mark.parametrize(("said", "heaps"), [("flags : avx2 avx512f", 1), ("flags : avx512_bf16", 2), ("", 1)])
def test_threads_share_one_heap_or_two_where_bfloat16_is_fast(said: str, heaps: int) -> None:
    command = [sys.executable, "-c", HEAPS, said, str(processor.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("Arena ") == heaps


FAULTS = """
import resource, threading
import flexlora
import torch
from flexlora.processor import give_back
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def work():
    for _ in range(20):
        torch.ones(2**21)  # 8 MB, 2,048 pages
work()
before = faults()
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
print(faults() - before)
kept = [torch.ones(2**21) for _ in range(20)]
del kept
held = resident()
give_back()
print(held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_freed_memory_stays_for_all_threads_until_it_is_given_back() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    faults, given = map(float, done.stdout.split())
    assert faults < 60 * 2048 / 5  # of the pages that the threads asked for; a thread's first blocks may be new
    assert given > 100  # of 160 MB


@pytest.mark.parametrize("turns", [True, False])
@pytest.mark.parametrize("rows", [1, products.FEW, products.FEW + 1])
def test_few_rows_in_bfloat16_give_the_same_product(rows: int, turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_TURNS", turns)
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 96, generator=draw).bfloat16() for n in (rows, 130))
    y = mm(x, w.T)
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), x.double() @ w.double().T, atol=0.15, rtol=0.008)


TURNED = """
import sys
from flexlora import processor
processor._described = lambda: sys.argv[1]
import torch
from flexlora import products
from torch.utils._python_dispatch import TorchDispatchMode
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:
            print(*(tuple(x.shape) for x in args))
        return function(*args, **(kwargs or {}))
with Watch():
    products.mm(torch.ones(2, 8).bfloat16(), torch.ones(8, 3).bfloat16())
"""


@pytest.mark.parametrize(
    ("said", "factors"),
    [
        ("vendor_id : GenuineIntel\nflags : amx_bf16", "(3, 8) (8, 2)"),
        ("vendor_id : AuthenticAMD\nflags : avx512_bf16", "(2, 8) (8, 3)"),
    ],
)
def test_few_rows_in_bfloat16_are_turned_round_where_that_is_faster(said: str, factors: str) -> None:
    done = subprocess.run([sys.executable, "-c", TURNED, said], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == factors


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")
def test_what_was_freed_between_tensors_that_live_is_used_again() -> None:
    """Half of them are freed, each between two that live: as many of the same size fit into their places."""
    size = 29_989  # an odd one, below what is mapped by itself; nothing else in this process has it
    alive = [products.empty(size) for _ in range(32)]
    freed = {x.data_ptr() for x in alive[1::2]}
    del alive[1::2]
    again = [products.empty(size) for _ in freed]
    # Some may go into holes that other tests left.
    assert len({x.data_ptr() for x in again} & freed) > len(freed) / 2
    assert {(x.dtype, x.shape, x.device.type) for x in again} == {(torch.float32, (size,), "cpu")}
