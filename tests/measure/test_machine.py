import platform
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import psutil
import pytest

from penjing.measure.machine import cores, from_cpuinfo, from_sysctl, instruction_sets, machine, processors, versions
from penjing.records import Machine, from_dict, to_json

XEON = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx f16c fma avx2 avx512f avx512bw avx512vl avx512_vnni avx_vnni avx512_bf16 amx_tile amx_int8 \
amx_bf16 avx512_vpopcntdq avx512_fp16

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""
APPLE = """\
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_BF16: 0
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.AdvSIMD: 1
hw.optional.floatingpoint: 1
machdep.cpu.brand_string: Apple M2
"""
OLD_MAC = """\
hw.optional.avx2_0: 1
machdep.cpu.brand_string: Intel(R) Core(TM) i7-1068NG7 CPU @ 2.30GHz
machdep.cpu.features: FPU SSE2 FMA AVX1.0 F16C
machdep.cpu.leaf7_features: AVX2 AVX512F AVX512BW AVX512VL AVX512VNNI
"""


def test_linux_on_x86():
    name, words = from_cpuinfo(XEON)
    assert name == "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz"
    assert instruction_sets(words) == (
        *("f16c", "fma", "avx", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
        *("avx512_fp16", "avx512_vpopcntdq", "amx_tile", "amx_int8", "amx_bf16"),
    )


def test_linux_on_arm_has_numbers_for_a_name():
    name, words = from_cpuinfo(GRAVITON)
    assert name == "Arm implementer 0x41 part 0xd40"
    assert instruction_sets(words) == ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve")


def test_mac():
    name, words = from_sysctl(APPLE)
    assert name == "Apple M2"
    assert instruction_sets(words) == ("neon", "fp16", "dotprod", "i8mm")
    name, words = from_sysctl(OLD_MAC)
    assert name.startswith("Intel(R) Core(TM) i7")
    assert instruction_sets(words) == ("f16c", "fma", "avx", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni")


def test_nothing_to_read_is_nothing_known():
    assert from_cpuinfo("") == ("", [])
    assert from_sysctl("") == ("", [])
    assert instruction_sets([]) == ()


def test_this_machine():
    here = machine(threads=3)
    assert here.threads == 3
    assert here.processor
    assert here.python == platform.python_version()
    assert here.memory_bytes == psutil.virtual_memory().total
    assert platform.system() in here.system
    assert from_dict(Machine, {**vars(here), "instruction_sets": list(here.instruction_sets)}) == here
    assert to_json(here) == to_json(machine(threads=3))


def test_instruction_sets_agree_with_what_numpy_found():
    features = pytest.importorskip("numpy._core._multiarray_umath").__cpu_features__
    theirs = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512_SPR": "avx512_fp16", "ASIMD": "neon", "ASIMDDP": "dotprod"}
    detected = machine(1).instruction_sets
    for name, ours in theirs.items():
        if name in features and not (name == "AVX512_SPR" and sys.platform == "win32"):
            assert (ours in detected) == features[name], f"{name} on NumPy {np.__version__}"


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= cores() <= len(processors())
    if not hasattr(psutil.Process, "cpu_affinity"):
        pytest.skip("this system has no affinity")
    assert sorted(processors()) == sorted(psutil.Process().cpu_affinity())
    program = (
        "import psutil; from penjing.measure.machine import *; "
        f"psutil.Process().cpu_affinity([{processors()[-1]}]); print(cores(), processors())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"1 ({processors()[-1]},)"


def test_versions_of_what_is_installed_without_importing_it():
    installed = versions()
    assert installed["python"] == platform.python_version()
    assert installed["numpy"] == version("numpy")
    assert installed["torch"] == version("torch")
    assert "onnxruntime-gpu" not in installed or version("onnxruntime-gpu")
    program = "import sys; from penjing.measure.machine import versions; versions(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
