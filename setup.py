"""Builds the C++ and CUDA operators of csrc/ at install time, so that nothing compiles at train time.

    csrc/bindings.cpp absent      pure Python
    MEGAGPT2_NO_EXT=1             pure Python, the operators run on their reference path
    otherwise                     megagpt2._C: CPU sources always; CUDA sources where torch was built for CUDA
                                  and nvcc is there (a GPU need not be: login nodes build for compute nodes)

The flags name no processor: the operators choose among vector instructions when they run, so login nodes build for
compute nodes of another kind. The module remembers which sources it was built from, and megagpt2/kernels/extension.py
leaves it alone when they are not those at hand. Python's and torch's stable interfaces let one build serve later ones
of both.

Everything else about the package is in pyproject.toml.
"""

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# Only the stable interfaces of torch 2.11 and Python 3.10: later ones have them too.
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
NVCC = ["-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", *STABLE]
ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST names others; newer GPUs compile the PTX as they load it


def has_nvcc(cuda_home: str | None) -> bool:
    """Whether the CUDA toolkit that torch found has its compiler."""
    return cuda_home is not None and (Path(cuda_home) / "bin" / "nvcc").exists()


def hash_of_sources(folder: Path) -> str:
    """Names and contents of csrc/'s sources. megagpt2/kernels/extension.py computes the same."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def extension_arguments() -> dict:
    """The arguments of setup() that build csrc/, or none where there is nothing to build."""
    if os.environ.get("MEGAGPT2_NO_EXT") == "1" or not (ROOT / "csrc" / "bindings.cpp").exists():
        return {}
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"megagpt2: building csrc/ needs an importable torch ({error}). Install torch first and pass "
            "--no-build-isolation to pip, or set MEGAGPT2_NO_EXT=1 to install without the compiled operators."
        ) from error

    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").exists():
        raise SystemExit(
            f"megagpt2: building csrc/ needs Python's headers, and {include} has no Python.h. Install them (apt-get "
            "install python3-dev, dnf install python3-devel), or set MEGAGPT2_NO_EXT=1 to install without the compiled "
            "operators."
        )
    with_cuda = torch.version.cuda is not None and has_nvcc(cpp_extension.CUDA_HOME)
    paths = [ROOT / "csrc" / "bindings.cpp", *sorted(ROOT.glob("csrc/*/*.cpp"))]
    stamp = f"-DMEGAGPT2_SOURCES=s{hash_of_sources(ROOT / 'csrc')}"  # "s": a macro's text that starts with a letter
    # x * y - z rounds once: exponentials count on it, and not every compiler does so unasked. GCC 12 warns of its own
    # AVX512 header, and of an interface between files that vectors don't cross.
    quiet = ["-Wno-maybe-uninitialized", "-Wno-psabi"]
    flags = {"cxx": ["-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", *quiet, stamp, *STABLE]}
    if sys.platform == "linux":
        flags["cxx"].append("-fopenmp")
    if with_cuda:
        paths += sorted(ROOT.glob("csrc/*/*.cu"))
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)  # not that of a GPU which happens to be here
        # What torch makes of that list for nvcc, in short: the module says what it was built for.
        targets = [flag.rpartition("code=")[2] for flag in cpp_extension._get_cuda_arch_flags()]
        flags["cxx"].append(f"-DMEGAGPT2_CUDA={'-'.join(targets)}")
        flags["nvcc"] = [*NVCC, stamp]
    make_extension = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = make_extension(
        name="megagpt2._C",
        sources=[str(path.relative_to(ROOT)) for path in paths],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    # force: whether something has to be compiled is ninja's to decide, which looks at headers and flags too
    return {
        "ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension},
        "options": {"build_ext": {"force": True}, "bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**extension_arguments())
