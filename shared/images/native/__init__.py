# SPDX-License-Identifier: Apache-2.0
"""Load crop_jpeg.c as a library, which this machine's C compiler makes at the first use, in about a second."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ...errors import say
from ...files import complete
from ...launch import rank
from ..index import cache_folder

MULTIARCH = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"  # Debian's headers that depend on the machine
SOURCE = Path(__file__).with_name("crop_jpeg.c")
SWITCH = "RECIPES_NATIVE_DECODER"
OPTIONS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")  # fused products would round the weights differently


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the result of `load`, called once per process: call this before worker processes are forked."""
    return load()


def load() -> ctypes.CDLL | None:
    """Return the library, from the cache of `$SCRATCH` or of the user; None under RECIPES_NATIVE_DECODER=0, and
    where no C compiler or no libjpeg-turbo with its headers is installed. Print that it was compiled, or why not."""
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = shlex.split(os.environ.get("CC") or "cc")
    headers = next((folder for folder in _include_folders() if (folder / "jpeglib.h").exists()), None)
    if sys.platform not in ("linux", "darwin") or headers is None or not shutil.which(compiler[0]):
        return None
    try:
        path = cache_folder() / f"crop_jpeg-{_key(headers)}.so"
        if not path.exists() or path.stat().st_uid != os.getuid():  # never run another user's
            _compile(compiler, headers, path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        if "ABSENT" not in str(error):
            say(f"JPEGs will be decoded more slowly, without {SOURCE.name}: {error}", sys.stderr)
        return None


def _include_folders() -> list[Path]:
    named = [os.environ.get(variable, "") for variable in ("CPATH", "C_INCLUDE_PATH")]
    prefixes = [sys.prefix, os.environ.get("CONDA_PREFIX", ""), "/opt/homebrew", "/usr/local", "/usr"]
    system = [f"{prefix}/include" for prefix in prefixes if prefix]
    return [Path(name) for name in (*":".join(named).split(":"), *system, MULTIARCH) if name]


def _key(headers: Path) -> str:
    """Return a hash of all that decides what the compiler makes: machines that differ may share the cache."""
    configurations = (folder / "jconfig.h" for folder in (headers, Path(MULTIARCH)))  # the version and its options
    library = next((path.read_bytes() for path in configurations if path.exists()), b"")
    words = [platform.machine(), sys.platform, str(headers), *OPTIONS]
    parts = [SOURCE.read_bytes(), library, *map(os.fsencode, words)]
    return hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()


def _compile(compiler: list[str], headers: Path, path: Path) -> None:
    """Make the library, complete or absent: it is written beside its place, then renamed, even if others do the
    same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler, *OPTIONS, str(SOURCE), "-ljpeg"]
    if not headers.is_relative_to("/usr/include"):  # compiler and linker know these
        places = [headers.parent / name for name in ("lib", "lib64")]
        command += [f"-I{headers}", *(word for place in places for word in (f"-L{place}", f"-Wl,-rpath,{place}"))]
    options = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL}
    with complete(path) as partial:
        process = subprocess.run([*command, "-o", str(partial)], **options)
        if process.returncode:
            lines = process.stderr.splitlines()
            raise OSError(next((line for line in lines if "error" in line), f"{compiler[0]} failed"))
    if rank() == 0:
        say(f"compiled {SOURCE.name} for this machine, to decode JPEGs faster ({SWITCH}=0: without)", sys.stderr)


def _declared(made: ctypes.CDLL) -> ctypes.CDLL:
    image = [ctypes.c_char_p, ctypes.c_size_t]
    made.jpeg_size.argtypes, made.jpeg_size.restype = image, ctypes.c_uint64
    made.crop_jpeg.argtypes = [*image, *[ctypes.c_int] * 6, ctypes.c_void_p]
    return made


def libjpeg_version() -> str:
    """Return the version of libjpeg-turbo that the library was compiled for, such as 2.1.5."""
    number = ctypes.c_int.in_dll(library(), "libjpeg_turbo").value
    return ".".join(str(number // 1000**power % 1000) for power in (2, 1, 0))
