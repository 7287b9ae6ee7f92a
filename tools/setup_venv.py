"""Create the development virtual environment, with the standard library only: nothing is installed yet.

The one slow step is compiling llama-cpp-python. It is built for this processor with GGML_RPC on and the wheel
is kept in the user's cache, keyed by everything that decides whether it may be reused.

With `--vulkan-beside VENV`, the new environment has a build for Vulkan; all other packages are those of VENV.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CMAKE_ARGS = "-DGGML_RPC=ON"
VULKAN_ARGS = f"{CMAKE_ARGS} -DGGML_VULKAN=ON"
VULKAN_PACKAGES = {
    "glslc": "bin/glslc",
    "libvulkan-dev": "include/vulkan/vulkan.h",
    "mesa-vulkan-drivers": "share/vulkan/icd.d/*.json",
    "spirv-headers": "include/spirv/unified1/spirv.hpp",
}
"""Debian's packages that a build for Vulkan needs, and a file of each. The driver may be another one."""


def say(text: str) -> None:
    """Print one line of progress on stderr."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def missing_packages() -> list[str]:
    """Return the names of Debian's packages whose files are missing. A Vulkan SDK has the same files."""
    prefixes = [Path(prefix) for prefix in ("/usr", "/usr/local", os.environ.get("VULKAN_SDK")) if prefix]
    return [
        name
        for name, file in VULKAN_PACKAGES.items()
        if not any(found for prefix in prefixes for found in prefix.glob(file))
    ]


def llama_requirement() -> str:
    """Return the requirement of llama-cpp-python in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if line.startswith("llama-cpp-python"))


def processor() -> str:
    """Return a description of the processor: a wheel tuned for one must not be used on another."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return line
    return f"{platform.processor()} {platform.mac_ver()[0]}"


def wheel_folder(cache: Path, requirement: str, cmake_args: str) -> Path:
    """Return the cache folder of the wheel for this interpreter, processor, requirement and build options."""
    key = "\n".join((requirement, cmake_args, processor()))
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.system()}-{platform.machine()}"
    return cache / "wheels" / f"{tag}-{hashlib.sha256(key.encode()).hexdigest()[:12]}".lower()


def build_wheel(python: Path, folder: Path, requirement: str, cmake_args: str) -> Path:
    """Return the path of the cached wheel. Compile it first if it is missing."""
    found = sorted(folder.glob("llama_cpp_python-*.whl"))
    if found:
        return found[-1]
    say("step 2 of 3: compiling llama-cpp-python for this processor (once; it takes a few minutes)")
    building = folder.with_name(f"{folder.name}.{os.getpid()}")
    building.mkdir(parents=True, exist_ok=True)
    # pip's own cache ignores CMAKE_ARGS: it returns a wheel that was built with other options.
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-binary", "llama-cpp-python"]
    try:
        subprocess.run(
            [*command, "--wheel-dir", building, requirement],
            check=True,
            env={**os.environ, "CMAKE_ARGS": cmake_args},
        )
        if not folder.exists():
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return sorted(folder.glob("llama_cpp_python-*.whl"))[-1]


def create(venv: Path) -> Path:
    """Create an empty environment in place of an old one, finished or not. Return its interpreter."""
    say(f"step 1 of 3: creating {venv} with Python {platform.python_version()}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
    return venv / "bin" / "python"


def site_packages(python: Path) -> Path:
    """Return the folder that an environment's packages are in."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def main() -> int:
    """Create the environment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--vulkan-beside", type=Path, metavar="VENV")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - the user's python3 may be anything
        say(f"Python 3.11 or newer is needed, this is {platform.python_version()}: make PYTHON=python3.12")
        return 1
    beside = options.vulkan_beside
    missing = missing_packages() if beside else []
    if missing:
        say(f"a build for Vulkan needs more packages: sudo apt-get install {' '.join(missing)}")
        return 1
    python = create(options.venv)
    base_args = VULKAN_ARGS if beside else CMAKE_ARGS
    cmake_args = " ".join(filter(None, (base_args, os.environ.get("CMAKE_ARGS"))))
    requirement = llama_requirement()
    wheel = build_wheel(python, wheel_folder(options.cache, requirement, cmake_args), requirement, cmake_args)
    say("step 3 of 3: downloading and installing the packages (it takes a few minutes)")
    install = [python, "-m", "pip", "install", "--quiet", wheel]
    if beside:
        subprocess.run([*install, "--no-deps"], check=True)
        others = site_packages(beside / "bin" / "python")
        # addsitedir also reads the .pth files there, such as that of the editable install.
        line = f"import site; site.addsitedir({str(others)!r})\n"
        (site_packages(python) / "beside.pth").write_text(line, encoding="utf-8")
    else:
        subprocess.run([*install, "--editable", f"{ROOT}[dev]"], check=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        say(f"failed with exit status {error.returncode}: {' '.join(map(str, error.cmd))}")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted: run the same command again to continue")
        sys.exit(130)
