"""Compile a native library on first use and keep it in a cache of the user.

A library is a plain C interface behind `ctypes`, so one binary serves every version of PyTorch. Its file name
carries a hash of everything it depends on: the sources, the command, the compiler and the machine. A cached
file is therefore never stale and never replaced; a build goes to a temporary file that is renamed when it is
complete, and a lock keeps two processes from building the same library at once.

The cache is `$QUANTLAB_CACHE/kernels`, by default `~/.cache/quantlab/kernels`. Where it cannot be written, a
private folder among the temporary files takes its place.
"""

import fcntl
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Contraction to fused multiply-add stays at the default of the compiler: results may differ between instruction
# sets, never between runs. -O3 without -ffast-math, since NaN and infinities must stay what they are.
CXX_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra")

_KEY_LENGTH = 20
_MAX_OUTPUT_CHARACTERS = 4000


class BuildError(RuntimeError):
    """A native library could not be compiled; the message holds the reason and the remedy."""


@dataclass(frozen=True)
class Recipe:
    """How to make one library.

    Attributes:
        name: begin of the file name; also names the variant, for example "lut-avx512".
        sources: files to compile.
        headers: files that the sources include; they count for the cache, no more.
        command: compiler and flags. The sources and `-o FILE` are added to it.
    """

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    command: tuple[str, ...]


def cxx_command(flags: Sequence[str] = ()) -> tuple[str, ...]:
    """The C++ compiler, `$CXX` or else g++, with the flags that every library shares and `flags`."""
    return (*shlex.split(os.environ.get("CXX", "g++")), *CXX_FLAGS, *flags)


def build_library(recipe: Recipe) -> Path:
    """The file of the compiled library, from the cache if it is there.

    Raises:
        BuildError: there is no compiler, it fails, or no folder can be written.
    """
    key = _key(recipe)
    file_name = f"{recipe.name}-{key}.so"
    folders = cache_folders()
    for folder in folders:
        # A folder that others can write could hold anybody's code.
        if (folder / file_name).is_file() and _belongs_to_user(folder):
            return folder / file_name
    problems = []
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _belongs_to_user(folder):
                raise PermissionError(f"{folder} belongs to another user")
            with _locked(folder / f"{file_name}.lock"):
                if not (folder / file_name).is_file():
                    _compile(recipe, key, folder / file_name)
        except OSError as error:
            problems.append(str(error))
        else:
            return folder / file_name
    raise BuildError(
        f"no folder for the compiled library {recipe.name} can be written ({'; '.join(problems)}); "
        "set QUANTLAB_CACHE to one that can"
    )


def cache_folders() -> list[Path]:
    """Where compiled libraries are looked for, and kept in the first that can be written; they may not exist."""
    return [_user_cache(), _temporary_cache()]


def _key(recipe: Recipe) -> str:
    digest = hashlib.sha256()
    parts = [platform.system(), platform.machine(), _compiler_version(recipe.command[0]), *recipe.command]
    for part in parts:
        digest.update(part.encode() + b"\0")
    for path in (*recipe.sources, *recipe.headers):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:_KEY_LENGTH]


@functools.cache
def _compiler_version(compiler: str) -> str:
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the compiler {compiler!r} does not run ({error}); install it (Debian: apt install g++), or name another "
            "one in CXX"
        ) from error
    return result.stdout


def _compile(recipe: Recipe, key: str, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f"{target.stem}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        command = [*recipe.command, *map(str, recipe.sources), "-o", temporary]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode:
            output = (result.stderr + result.stdout).strip()[:_MAX_OUTPUT_CHARACTERS]
            raise BuildError(
                f"compiling {recipe.name} ended with status {result.returncode}.\n{shlex.join(command)}\n{output}"
            )
        if _key(recipe) != key:  # what was compiled is not what the name says
            raise BuildError(f"the sources of {recipe.name} changed while they were compiled; start again")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _user_cache() -> Path:
    if root := os.environ.get("QUANTLAB_CACHE"):
        return Path(root).expanduser() / "kernels"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home
        return _temporary_cache()
    return base / "quantlab" / "kernels"


def _temporary_cache() -> Path:
    return Path(tempfile.gettempdir()) / f"quantlab-kernels-{os.getuid()}"


def _belongs_to_user(folder: Path) -> bool:
    owner = folder.stat()
    return owner.st_uid in (os.getuid(), 0) and not owner.st_mode & 0o002


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the file stays, since removing it would let two processes lock two files."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
