"""Compiles bnext._C ahead of time; all that is not about compiling is in pyproject.toml.

CUDA and CPU where torch has CUDA and a CUDA compiler is found, the CPU alone otherwise. Honours
CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS. With BNEXT_BUILD=jit nothing is compiled here.
"""

import importlib.util
import os
import sys
from pathlib import Path

import setuptools

SETUPTOOLS = 77  # the first that reads pyproject.toml


def load_toolchain():
    """bnext/_toolchain.py without the package around it, which is not built yet."""
    spec = importlib.util.spec_from_file_location("bnext_toolchain", Path(__file__).parent / "bnext" / "_toolchain.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension():
    import torch
    from torch.utils import cpp_extension

    tools = load_toolchain()
    tools.put_ninja_on_path()
    toolkit, architectures, library_dirs = None, [], []
    if torch.version.cuda is not None:
        toolkit, _ = tools.find_toolkit(torch.version.cuda)
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit.home)  # torch's own guess may hold no headers
        library_dirs = [str(tools.link_folder(toolkit, Path("build", "cudart").absolute()))]
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        architectures = tools.architectures_for(toolkit, gpus, tools.architectures_of_torch(torch))
    info = tools.describe(torch.__version__, torch.version.cuda, toolkit, architectures)
    recipe = tools.recipe(Path("csrc"), info, toolkit, architectures)
    kind = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    return kind(
        "bnext._C",
        [source.as_posix() for source in recipe.sources],
        library_dirs=library_dirs,
        extra_compile_args={"cxx": recipe.cxx, "nvcc": recipe.nvcc},
        extra_link_args=recipe.link,
    )


# pip --no-build-isolation does not look at what pyproject.toml requires, and environments of Python before 3.12 begin
# with an older one.
if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    sys.exit(
        f"bnext needs setuptools {SETUPTOOLS} or later to be built, and there is {setuptools.__version__}: "
        f"{sys.executable} -m pip install --upgrade 'setuptools>={SETUPTOOLS}'"
    )
if os.environ.get("BNEXT_BUILD") == "jit":
    setuptools.setup()
else:
    from torch.utils.cpp_extension import BuildExtension

    setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
