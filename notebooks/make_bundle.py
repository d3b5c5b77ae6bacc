"""A folder that needs no network: everything for the course, to carry into a classroom.

    python notebooks/make_bundle.py OUT            write it (needs the network once)
    python notebooks/make_bundle.py OUT --check    install from it with the network off, run the demo and a lesson

    wheelhouse/    wheels of minidsv3, JupyterLab and all that they need, for this system and this Python
    home/corpora/  texts in cache form: what MINIDSV3_HOME points to
    notebooks/     lessons, exercises, glossary, teacher's page
    SHA256SUMS     a hash for every file, as sha256sum --check reads it
    README.txt     three commands for a student

The check works in a temporary folder with an empty home and proxies that lead nowhere; pip is given no index.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPORA = ("shakespeare",)
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers
SUMS = "SHA256SUMS"
README = """minidsv3, a course without network ({system}, Python {python})

1. python3 -m venv course
2. course/bin/python -m pip install --no-index --find-links wheelhouse minidsv3 jupyter
3. MINIDSV3_HOME=home course/bin/jupyter lab notebooks
   (Windows: course\\Scripts\\... instead of course/bin/..., and `set MINIDSV3_HOME=home` on a line of its own)

First look: MINIDSV3_HOME=home course/bin/python -m minidsv3 demo
Whole and unchanged: sha256sum --check --quiet {sums}
"""
LESSON = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=300, kernel_name="python3").execute()
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpora", nargs="*", default=CORPORA, metavar="NAME", help="texts to take along")
    parser.add_argument("--check", action="store_true", help="install from OUT offline and run it")
    parser.add_argument("--lesson", default="00_tour", help="the one that --check runs")
    parser.add_argument("--seconds", type=float, default=5, help="training time of the demo that --check runs")
    args = parser.parse_args()
    if args.check:
        check(args.out, args.lesson, args.seconds)
    else:
        build(args.out, args.corpora)
    return 0


def build(out: Path, corpora: list[str]) -> None:
    """Write the bundle; a folder of an earlier one is replaced, any other folder is refused."""
    if out.exists() and any(out.iterdir()) and not (out / SUMS).exists():
        raise SystemExit(f"{out} is not empty and no bundle: choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheelhouse"
    wheels.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    requirements = str(ROOT / "requirements.txt")
    binary = ["--only-binary", ":all:"]
    subprocess.run([*pip, "download", "--quiet", *binary, "--dest", str(wheels), "-r", requirements], check=True)
    for name in corpora:
        command = [sys.executable, "-m", "minidsv3", "data", "build", name]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"MINIDSV3_HOME": str((out / "home").resolve())})
    copy_notebooks(out / "notebooks")
    version = ".".join(map(str, sys.version_info[:2]))
    (out / "README.txt").write_text(README.format(system=sys.platform, python=version, sums=SUMS), encoding="utf-8")
    write_sums(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {len(list(wheels.iterdir()))} wheels, {size / 1e6:.0f} MB")


def copy_notebooks(target: Path) -> None:
    """Lessons, exercises without their sources (they hold the solutions), and the pages beside them."""
    leave = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "source", "make_bundle.py")
    shutil.copytree(ROOT / "notebooks", target, ignore=leave)


def files_of(out: Path) -> list[Path]:
    """Every file but the sums themselves, in order."""
    return sorted(path for path in out.rglob("*") if path.is_file() and path.name != SUMS)


def write_sums(out: Path) -> None:
    """SHA256SUMS over all files."""
    lines = [f"{_sha256(path)}  {path.relative_to(out).as_posix()}\n" for path in files_of(out)]
    (out / SUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def verify_sums(out: Path) -> list[str]:
    """What is wrong, one line a file: changed, missing, or not listed."""
    lines = (out / SUMS).read_text(encoding="utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    there = {path.relative_to(out).as_posix(): path for path in files_of(out)}
    wrong = [f"missing: {name}" for name in listed.keys() - there.keys()]
    wrong += [f"not listed: {name}" for name in there.keys() - listed.keys()]
    wrong += [f"changed: {name}" for name in listed.keys() & there.keys() if _sha256(there[name]) != listed[name]]
    return sorted(wrong)


def check(out: Path, lesson: str, seconds: float) -> None:
    """Install and run with the network off; raises CalledProcessError or SystemExit where something does not work."""
    if wrong := verify_sums(out):
        raise SystemExit("\n".join(wrong))
    out = out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        venv.create(room / "course", with_pip=True)
        scripts = room / "course" / ("Scripts" if sys.platform == "win32" else "bin")
        python, env = str(scripts / Path(sys.executable).name), offline(room, out)
        env["PATH"] = f"{scripts}{os.pathsep}{env['PATH']}"

        def run(*arguments: str) -> None:
            subprocess.run([python, *arguments], check=True, cwd=room, env=env)

        find = ["--no-index", "--find-links", str(out / "wheelhouse")]
        run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *find, "minidsv3", "jupyter")
        run("-m", "minidsv3", "data", "list")
        run("-m", "minidsv3", "demo", "--seconds", str(seconds))
        run("-c", LESSON, str(out / "notebooks" / f"{lesson}.ipynb"))
    print(f"{out}: whole; installed, demo and lesson {lesson} run without network")


def offline(room: Path, out: Path) -> dict[str, str]:
    """An environment with an empty home, no package index and no way out."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON", "JUPYTER", "MINIDSV3", "VIRTUAL"))
    }
    home = {name: str(room) for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    proxies = {case(name): NOWHERE for name in ("http_proxy", "https_proxy", "all_proxy") for case in (str, str.upper)}
    own = {"MINIDSV3_HOME": str(out / "home"), "MINIDSV3_FAST": "1", "no_proxy": "", "NO_PROXY": ""}
    return kept | home | proxies | own | {"PIP_CONFIG_FILE": os.devnull}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
