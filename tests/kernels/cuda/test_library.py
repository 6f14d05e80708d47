from unittest.mock import MagicMock

import pytest
import torch

from quantlab_kernels import cuda_common, cuda_library, solver_cuda_library
from quantlab_kernels.build import BuildError


@pytest.fixture
def devices(monkeypatch):
    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(cuda_common.shutil, "which", lambda place: place)

    return pretend


@pytest.mark.parametrize("library", [cuda_library, solver_cuda_library], ids=lambda library: library.LIBRARY.name)
def test_code_is_compiled_for_the_visible_devices_alone(devices, library):
    devices((9, 0), (7, 5), (8, 6), (9, 0))
    recipe = library.LIBRARY._recipe()
    assert recipe.name == f"{library.LIBRARY.name}-sm86-90"
    assert [flag for flag in recipe.command if flag.startswith("arch=")] == [
        "arch=compute_86,code=sm_86",
        "arch=compute_90,code=sm_90",
    ]


def test_device_that_is_too_old_has_a_message(devices):
    devices((7, 5))
    with pytest.raises(BuildError, match=r"compute capability \(8, 0\) or newer; found \[\(7, 5\)\]"):
        cuda_library.LIBRARY._recipe()


def test_compiler_is_that_of_the_environment(devices, monkeypatch):
    devices((9, 0))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda_library.LIBRARY._recipe().command[0] == "nvcc"
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda-12")
    assert cuda_library.LIBRARY._recipe().command[0] == "/opt/cuda-12/bin/nvcc"
    monkeypatch.setattr(cuda_common.shutil, "which", lambda place: None)
    with pytest.raises(BuildError, match=r"nvcc, which is not there \(/opt/cuda-12/bin/nvcc\); .* CUDA_HOME"):
        cuda_library.LIBRARY._recipe()


@pytest.mark.parametrize("library", [cuda_library, solver_cuda_library], ids=lambda library: library.LIBRARY.name)
def test_driver_that_is_too_old_has_a_message(library):
    functions = MagicMock()
    for prefix in ("quantlab_cuda", "quantlab_solver"):
        getattr(functions, f"{prefix}_probe").return_value = 35
        getattr(functions, f"{prefix}_error").return_value = b"CUDA driver version is insufficient"
    with pytest.raises(BuildError, match=r"status 35: CUDA driver version is insufficient; .* CUDA_HOME"):
        library.declare(functions)


@pytest.mark.parametrize(
    "folder", [cuda_library.SOURCE_FOLDER, solver_cuda_library.SOURCE_FOLDER], ids=lambda f: f.name
)
def test_every_source_and_header_counts_for_the_cache(folder):
    recipe = cuda_common.cuda_recipe("any", folder, ["80"])
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert {*recipe.sources, *recipe.headers} == files | {cuda_common.INTRINSICS_FOLDER / "intrinsics.cuh"}


@pytest.mark.parametrize("operation", ["lut_matmul", "lut_matmul_prepared"])
def test_operations_have_kernels_for_cuda(operation):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantlab::{operation}", "CUDA")
