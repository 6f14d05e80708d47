import subprocess
import sys
import warnings

import pytest
import torch

import quantlab_kernels
from quantlab_kernels import cpu, native
from quantlab_kernels.build import BuildError
from quantlab_kernels.isa import Isa, chosen_isa, detected_isa
from quantlab_kernels.native import NativeLibrary


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(native, "_LIBRARIES", [])
    monkeypatch.setattr(native, "_warned", set())


def failing(message):
    def recipe():
        raise BuildError(message)

    return recipe


def test_a_library_that_cannot_be_built_warns_once_and_says_so_in_the_status(registered):
    libraries = [NativeLibrary(name, failing("no compiler"), lambda _: None) for name in ("one", "two")]
    assert quantlab_kernels.status() == {"one": "not used yet", "two": "not used yet"}
    with pytest.warns(RuntimeWarning, match="slow reference .*: no compiler\n.*QUANTLAB_KERNELS=reference") as caught:
        assert [library.get() for library in libraries * 2] == [None] * 4
    assert len(caught) == 1
    assert quantlab_kernels.status() == {"one": "reference: no compiler", "two": "reference: no compiler"}


def test_the_environment_turns_native_code_off_without_a_warning(registered, monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    library = NativeLibrary("one", failing("must not be asked"), lambda _: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.get() is None
    assert library.state == "reference: QUANTLAB_KERNELS=reference"


def test_an_unknown_choice_of_kernels_is_refused(registered, monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="QUANTLAB_KERNELS='fast' must be 'native' or 'reference'"):
        NativeLibrary("one", failing(""), lambda _: None).get()


def test_the_status_names_the_build_in_use():
    cpu.LIBRARY.get()
    assert quantlab_kernels.status()["lut_matmul"] == f"lut-{chosen_isa().name.lower()}"


def test_the_instruction_set_of_the_environment_is_taken_if_the_machine_has_it(monkeypatch):
    monkeypatch.delenv("QUANTLAB_CPU_ISA", raising=False)
    assert chosen_isa() is detected_isa()
    monkeypatch.setenv("QUANTLAB_CPU_ISA", "portable")
    assert chosen_isa() is Isa.PORTABLE
    for wanted in ("avx1024", "AVX2"):
        monkeypatch.setenv("QUANTLAB_CPU_ISA", wanted)
        with pytest.raises(ValueError, match=f"QUANTLAB_CPU_ISA='{wanted}': this machine runs portable"):
            chosen_isa()


def test_an_instruction_set_that_the_machine_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("quantlab_kernels.isa.detected_isa", lambda: Isa.AVX2)
    monkeypatch.setenv("QUANTLAB_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match=r"this machine runs portable, avx2$"):
        chosen_isa()


def test_decoding_without_a_compiler_warns_once_and_gives_the_reference(tmp_path):
    code = (
        "import torch, quantlab_kernels as q\n"
        "x, w, c = torch.ones(1, 32), torch.zeros(4, 3, 1, dtype=torch.int32), torch.ones(3, 1, 16).half()\n"
        "print([torch.ops.quantlab.lut_matmul(x, w, c).tolist() for _ in range(2)], q.status()['lut_matmul'][:40])\n"
    )
    environment = {"PATH": "", "QUANTLAB_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"[{[[32.0] * 3]}, {[[32.0] * 3]}] reference: the compiler 'g++' does not r\n"
    assert result.stderr.count("native kernels are not available") == 1


def test_the_reference_is_chosen_by_the_environment(monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    x, words, book = torch.randn(2, 40), torch.zeros(4, 3, 2, dtype=torch.int32), torch.randn(3, 1, 16).half()
    expected = torch.nn.functional.linear(x, book[:, :, 0].float().repeat(1, 40))
    assert torch.equal(torch.ops.quantlab.lut_matmul(x, words, book), expected)
    assert quantlab_kernels.prepare(words, book, None, 40, torch.float32) is None
