"""Makes the virtual environment: what to install, chosen by this machine, from `requirements.lock`.

Knows the lock file's sections, the NVIDIA driver's CUDA version and pip. Refuses to know anything of the
engine: it runs as a plain file (`python sharp/environment.py`) before a single package is there, so it
imports the standard library alone and keeps to syntax that an older Python can still read, in order to
say which Python is needed.

`requirements.lock` is one file of sections, each opened by a comment line `# [name]`:

    [run]      what every command needs
    [cuda12]   numba-cuda and the CUDA libraries for a driver of CUDA 12   } they conflict with each
    [cuda13]   the same for CUDA 13 and newer                             } other: never both
    [dev]      tests, linter, type checker, notebook runner
    [notebooks] JupyterLab, for `just lab`

Every section has the versions of [run] and holds only what [run] does not. A stamp in the environment
records the hash of each installed section, so a second run has nothing to do and ends in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOCK_FILE = "requirements.lock"
SECTIONS = ("run", "cuda12", "cuda13", "dev", "notebooks")
EXCLUDES = {"cuda12": "cuda13", "cuda13": "cuda12"}
OLDEST_PYTHON, FIRST_PYTHON_TOO_NEW = (3, 11), (3, 14)
LOCK_HEADER = """\
# Every version and hash this project installs, for Python 3.11 to 3.13 on Linux, WSL2 and macOS.
# Made by `just lock` from pyproject.toml; read by sharp/environment.py, which installs the sections it
# needs. cuda12 and cuda13 exclude each other. No addresses in here: pip's own configuration says from where.
"""


class SetupError(Exception):
    """What stopped the setup, in words for the person who started it."""


def check_python(version: tuple[int, int]) -> None:
    """Raise SetupError unless `version` (major, minor) is one this project runs on."""
    if not OLDEST_PYTHON <= version < FIRST_PYTHON_TOO_NEW:
        raise SetupError(
            "sharp needs Python 3.11, 3.12 or 3.13, and this is {}.{}: remove .venv and make it again with "
            "one of those, e.g. python3.12 -m venv .venv".format(*version)
        )


def read_sections(text: str) -> dict[str, list[str]]:
    """The lock file's text -> {section: requirement blocks}, a block being one pin with all its hashes."""
    sections: dict[str, list[str]] = {}
    blocks: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"# \[(\w+)\]", line)
        if header:
            blocks = sections.setdefault(header.group(1), [])
        elif line.startswith("#") or not line.strip():
            continue
        elif not sections:
            raise SetupError(f"{LOCK_FILE} line {number} stands before any section: make it again, just lock")
        elif line[0].isspace():
            blocks[-1] += "\n" + line
        else:
            blocks.append(line)
    return sections


def pin_name(block: str) -> str:
    """A requirement block -> its package's name. In one lock a name has one version in every section."""
    return block.split("==", 1)[0]


def driver_cuda_version() -> int | None:
    """The newest CUDA that the NVIDIA driver runs, as 1000 * major + 10 * minor; None without a driver.

    Asks libcuda (cuDriverGetVersion needs no cuInit and no visible GPU), then nvidia-smi.
    """
    for name in ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1"):
        try:
            libcuda = ctypes.CDLL(name)
            version = ctypes.c_int(0)
            status = libcuda.cuDriverGetVersion(ctypes.byref(version))
        except (OSError, AttributeError):
            continue
        if status == 0 and version.value > 0:  # the toolkit's stub library answers with an error
            return version.value
    smi = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if smi:
        try:
            done = subprocess.run([smi], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return parse_smi(done.stdout)
    return None


def parse_smi(text: str) -> int | None:
    """nvidia-smi's table -> its `CUDA Version: 12.8` as 12080, or None where it shows none."""
    found = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", text)
    return 1000 * int(found.group(1)) + 10 * int(found.group(2)) if found else None


def choose_sections(
    driver: int | None, platform: str, dev: bool = False, notebooks: bool = False
) -> tuple[list[str], str]:
    """(driver's CUDA version, sys.platform, what is asked for) -> (sections to install, a line saying why).

    Without a driver the tests still want a CUDA section where one exists: they run the kernels in numba's
    simulator and assemble them for real chips, neither of which needs a GPU.
    """
    sections = ["run"]
    if platform == "darwin":
        found = "macOS: no CUDA, the numpy reference"
    elif driver is None:
        found = "no NVIDIA driver: the numpy reference"
        if dev:
            sections.append("cuda13")
            found = "no NVIDIA driver: cuda13 for the simulator and the assembler only"
    else:
        shown = f"NVIDIA driver with CUDA {driver // 1000}.{driver % 1000 // 10}"
        if driver >= 13000:
            sections.append("cuda13")
            found = shown + ": cuda13"
        elif driver >= 12000:
            sections.append("cuda12")
            found = shown + ": cuda12"
        else:
            found = shown + ", older than 12: the numpy reference"
    if dev:
        sections.append("dev")
    if notebooks:
        sections.append("notebooks")
    return sections, found


def digest(*parts: str) -> str:
    """One SHA-256 over the parts, in hexadecimal."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class Environment:
    """One virtual environment and what of the lock file it holds already."""

    def __init__(self, root: str, python: str) -> None:
        self.root, self.python = root, python
        self.path = os.path.join(root, ".venv")
        self.stamp_path = os.path.join(self.path, "sharp-setup.json")

    def read_stamp(self) -> dict[str, str]:
        try:
            with open(self.stamp_path, encoding="utf-8") as file:
                stamp = json.load(file)
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, stamp: dict[str, str]) -> None:
        partial = self.stamp_path + ".partial"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(stamp, file, indent=1)
        os.replace(partial, self.stamp_path)

    def install(self, names: list[str], found: str) -> bool:
        """Bring the environment to the named sections; returns whether anything had to be done."""
        with open(os.path.join(self.root, LOCK_FILE), encoding="utf-8") as file:
            sections = read_sections(file.read())
        absent = [name for name in names if name not in sections]
        if absent:
            raise SetupError(f"{LOCK_FILE} has no section {', '.join(absent)}: make it again, just lock")
        with open(os.path.join(self.root, "pyproject.toml"), encoding="utf-8") as file:
            package = digest(file.read(), self.root)
        wanted = {name: digest(*sections[name]) for name in names}

        stamp = self.read_stamp()
        if stamp.get("python") != self.python:  # made by another interpreter: trust nothing of it
            stamp = {"python": self.python}
        missing = [name for name in names if stamp.get(name) != wanted[name]]
        if not missing and stamp.get("package") == package:
            return False

        started = time.monotonic()
        if missing:
            blocks = list({pin_name(block): block for name in missing for block in sections[name]}.values())
            say(f"{found}; installing {' + '.join(missing)} ({len(blocks)} pins)")
            overwritten = {EXCLUDES[name] for name in missing if name in EXCLUDES}
            stamp = {name: value for name, value in stamp.items() if name not in overwritten.union(missing)}
            self.write_stamp(stamp)  # so that an interrupted installation is seen as one
            requirements = os.path.join(self.path, "sharp-requirements.txt")
            with open(requirements, "w", encoding="utf-8") as file:
                file.write("\n".join(blocks) + "\n")
            # The lock is complete, so --no-deps; wheels alone, so nothing is compiled here.
            pinned = ["--require-hashes", "--no-deps", "--only-binary=:all:", "-r", requirements]
            self.pip(pinned, len(blocks))
            stamp.update({name: wanted[name] for name in missing})
            self.write_stamp(stamp)
        if stamp.get("package") != package:
            # The build backend is pinned in [run]: no isolated build, no index, no download.
            self.pip(["--no-index", "--no-deps", "--no-build-isolation", "-e", self.root], 1)
            stamp["package"] = package
            self.write_stamp(stamp)
        say(f"ready in {time.monotonic() - started:.0f} s")
        return True

    def pip(self, arguments: list[str], num_packages: int) -> None:
        """Run pip with a bar on a terminal; its output is shown only when it fails."""
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        environment = {**os.environ, "PIP_REQUIRE_VIRTUALENV": "0", "PYTHONUNBUFFERED": "1"}
        shown: list[str] = []
        seen = 0
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                shown.append(line)
                if line.startswith(("Collecting ", "Requirement already", "Obtaining ")):
                    seen = min(seen + 1, num_packages)
                    draw_bar(seen, num_packages, line.split()[1].split("=")[0])
                elif line.startswith("Installing collected"):
                    draw_bar(num_packages, num_packages, "unpacking")
        draw_bar(0, 0, "")
        if process.returncode != 0:
            raise SetupError("pip failed:\n" + "".join(shown[-25:]).rstrip())


def draw_bar(done: int, total: int, label: str) -> None:
    """Redraw the one progress line on a terminal (total 0 wipes it); nothing elsewhere."""
    if not sys.stderr.isatty():
        return
    filled = 30 * done // total if total else 0
    text = f"  {'#' * filled}{'.' * (30 - filled)} {done}/{total} {label}" if total else ""
    sys.stderr.write("\r" + text[:78].ljust(78) + ("" if total else "\r"))
    sys.stderr.flush()


def say(text: str) -> None:
    """One line on stderr: stdout belongs to the command that follows."""
    print("setup: " + text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def only_one_at_a_time(path: str) -> Iterator[None]:
    """Hold a file lock: two recipes started together must not run pip over each other."""
    import fcntl

    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def setup(dev: bool, notebooks: bool) -> None:
    """Install what this machine needs into ROOT/.venv, or nothing when another interpreter runs this."""
    check_python(sys.version_info[:2])
    home = os.path.join(ROOT, ".venv")
    if os.path.realpath(sys.prefix) != os.path.realpath(home):
        say(f"{sys.executable} is not the one in .venv: nothing installed, it must have what is needed")
        return
    sections, found = choose_sections(driver_cuda_version(), sys.platform, dev, notebooks)
    with only_one_at_a_time(os.path.join(home, "sharp-setup.lock")):
        environment = Environment(ROOT, "{}.{}.{} {}".format(*sys.version_info[:3], sys.platform))
        if not environment.install(sections, found):
            say(f"{found}; {' + '.join(sections)} in place")


def compile_lock() -> None:
    """Write requirements.lock from pyproject.toml with uv, one section after another."""
    uv = os.path.join(os.path.dirname(sys.executable), "uv")
    if not os.path.exists(uv):
        raise SetupError("no uv beside this Python: just setup --dev installs it")
    work = os.path.join(ROOT, ".venv", "sharp-lock")
    os.makedirs(work, exist_ok=True)

    def resolve(extras: tuple[str, ...], constraints: dict[str, str]) -> dict[str, str]:
        """Extras -> {package: pin block}, held to the versions in `constraints`."""
        bounds = os.path.join(work, "constraints.txt")
        with open(bounds, "w", encoding="utf-8") as file:
            file.writelines(re.sub(r" \\.*", "", block, flags=re.S) + "\n" for block in constraints.values())
        command = [uv, "pip", "compile", "pyproject.toml", "--universal", "--generate-hashes", "--no-header"]
        command += ["--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--no-build", "--quiet"]
        command += ["--python-version", "3.11", "--fork-strategy", "fewest", "--constraints", bounds]
        command += [word for extra in extras for word in ("--extra", extra)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SetupError("uv found no solution for " + " + ".join(extras) + ":\n" + done.stderr)
        blocks = read_sections("# [all]\n" + done.stdout)["all"]
        pins = {pin_name(block): block for block in blocks}
        if len(pins) != len(blocks):
            raise SetupError("a package needs several versions: " + " + ".join(extras))
        return pins

    # One solution for everything that can be together comes first: what the parts share has its versions.
    together = resolve(("cuda13", "dev", "notebooks"), {})
    run = resolve((), together)
    sections = {"run": run}
    for name in ("cuda13", "dev", "notebooks"):
        sections[name] = resolve((name,), together)
    plain = {**run, **sections["dev"], **sections["notebooks"]}
    sections["cuda12"] = resolve(("cuda12",), plain)

    parts = [LOCK_HEADER]
    for name in SECTIONS:
        blocks = [block for key, block in sections[name].items() if name == "run" or key not in run]
        parts.append(f"\n# [{name}]\n" + "\n".join(blocks) + "\n")
    with open(os.path.join(ROOT, LOCK_FILE), "w", encoding="utf-8") as file:
        file.write("".join(parts))
    shutil.rmtree(work)
    written = read_sections("".join(parts))
    say(f"{LOCK_FILE}: " + ", ".join(f"{name} {len(blocks)}" for name, blocks in written.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description="Install what sharp needs into .venv.")
    parser.add_argument("--dev", action="store_true", help="also what tests, linter and type checker need")
    parser.add_argument("--notebooks", action="store_true", help="also JupyterLab")
    parser.add_argument("--lock", action="store_true", help="make requirements.lock again instead")
    arguments = parser.parse_args()
    try:
        compile_lock() if arguments.lock else setup(arguments.dev, arguments.notebooks)
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
