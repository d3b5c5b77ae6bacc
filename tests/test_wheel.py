"""The built wheel, installed outside the clone: the command line works, and finds its data files."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the clone's files so that nothing is written into the clone."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "Makefile"):
        if (CLONE / name).exists():
            shutil.copy(CLONE / name, source)
    for name in ("minidsv3", "data"):
        shutil.copytree(CLONE / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Run the interpreter of an empty venv that has the wheel, and our dependencies behind it."""
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    interpreter = folder / "venv" / scripts / Path(sys.executable).name
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([interpreter, "-c", ask], capture_output=True, encoding="utf-8", check=True, timeout=60)
    site = Path(found.stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    # A path in a .pth file is searched for modules; the .pth files in there, an editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    work = folder / "work"
    work.mkdir()

    def run(*arguments):
        return subprocess.run(
            [interpreter, *arguments], cwd=work, capture_output=True, encoding="utf-8", env=environment(), timeout=120
        )

    run.site, run.work = site, work
    return run


def environment():
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHONPATH", "PYTHONHOME"))}


def out(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_is_what_runs_and_not_the_clone(python):
    file = Path(out(python("-c", "import minidsv3; print(minidsv3.__file__)")).strip())
    assert file.is_relative_to(python.site) and not file.is_relative_to(CLONE / "minidsv3")
    found = out(python("-c", "import sys; print(*sys.path, sep='\\n')")).splitlines()
    assert str(CLONE) not in found


def test_wheel_holds_the_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(CLONE).as_posix() for path in (CLONE / "minidsv3").rglob("*.py")}
    sources |= {path.relative_to(CLONE).as_posix() for path in (CLONE / "minidsv3").rglob("*.npz")}
    data = {path.relative_to(CLONE / "data").as_posix() for path in (CLONE / "data").rglob("*.json")}
    assert sources | {f"minidsv3/_data/{name}" for name in data} <= names and len(data) >= 4
    assert sum(name.startswith("minidsv3/exercises/golden/") for name in names) == 17
    assert all(name.startswith(("minidsv3/", "minidsv3-")) for name in names)


def test_wheel_declares_its_dependencies_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode("utf-8")
        scripts = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode("utf-8")
    required = {line.split()[1].split(">")[0] for line in text.splitlines() if line.startswith("Requires-Dist: ")}
    assert {"numpy", "ml-dtypes", "tqdm", "matplotlib", "safetensors", "threadpoolctl", "networkx"} <= required
    assert "minidsv3 = minidsv3.__main__:main" in scripts


def test_wheel_help_lists_the_commands(python):
    said = out(python("-m", "minidsv3", "--help"))
    assert all(name in said for name in ("train", "eval", "generate", "data", "demo", "compare"))


def test_wheel_data_list_reads_the_recipes(python):
    assert "shakespeare" in out(python("-m", "minidsv3", "data", "list"))


def test_wheel_presets_read_the_published_shapes(python):
    program = (
        "from minidsv3.config import ModelConfig, data_file\n"
        "print(ModelConfig.preset('deepseek-v3').n_routed_experts, data_file('configs/deepseek-v3.json').parts[-3])"
    )
    assert out(python("-c", program)).split() == ["256", "_data"]


def test_wheel_trains_and_generates(python):
    more = ["--steps", "2", "--quiet", "--set", "num_hidden_layers=1", "eval_every=0"]
    said = out(python("-m", "minidsv3", "train", "--preset", "nano", "--data", "synthetic", "--out", "run", *more))
    assert said.splitlines()[-1].startswith("done: run/final holds the model")
    assert (python.work / "run" / "final" / "model.safetensors").is_file()
    said = out(python("-m", "minidsv3", "generate", "run", "--prompt", "1+1=", "--max-new-tokens", "4"))
    assert said.startswith("1+1=")
