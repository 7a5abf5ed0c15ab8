"""Searches for the fastest candidate, with a timer that knows the answers instead of a GPU."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from schatten.kernels.triton import tuning  # noqa: E402


class Tile(NamedTuple):
    rows: int
    warps: int


SLOW, FAST, MIDDLE = Tile(32, 4), Tile(64, 4), Tile(128, 8)
TILES = (SLOW, FAST, MIDDLE)
GPU = torch.device("cuda", 0)


class Bench:
    """A kernel whose candidates take known times, or raise, and a log of what was launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.times: dict[Tile, float | Exception] = {SLOW: 3.0, FAST: 1.0, MIDDLE: 2.0}
        self.launched: list[Tile] = []
        self.capturing = False
        monkeypatch.setattr(tuning, "interpreted", lambda: False)
        monkeypatch.setattr(tuning, "milliseconds", self.milliseconds)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.on("GPU of this test")
        self.new_process()

    def on(self, name: str) -> None:
        self.patch.setattr(torch.cuda, "get_device_name", lambda device: name)

    def new_process(self) -> None:
        """Forget what only memory holds."""
        self.patch.setattr(tuning, "_chosen", {})
        self.launched.clear()

    def run(self, tile: Tile) -> None:
        self.launched.append(tile)
        time = self.times[tile]
        if isinstance(time, Exception):
            raise time

    def milliseconds(self, launch: Callable[[], None], device: torch.device) -> float:
        launch()
        time = self.times[self.launched[-1]]
        assert isinstance(time, float)
        return time

    def choose(
        self,
        kernel: str = "gram",
        key: tuple[object, ...] = (768, torch.bfloat16),
        tiles: tuple[Tile, ...] = TILES,
        device: torch.device = GPU,
    ) -> Tile:
        return tuning.choose(kernel, key, tiles, self.run, device)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCHATTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def bench(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    def of(size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)

    yield of


def only(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_the_fastest_candidate_is_chosen_and_each_is_timed_once(bench: Bench) -> None:
    assert bench.choose() == FAST
    assert bench.launched == list(TILES)


def test_what_was_chosen_is_remembered_in_memory_and_by_the_next_process(bench: Bench, cache: Path) -> None:
    bench.choose()
    only(cache).rename(cache / "away")
    assert bench.choose() == FAST
    assert bench.launched == list(TILES)
    (cache / "away").rename(cache / json.loads((cache / "away").read_text())["kernel"])
    bench.new_process()
    assert bench.choose() == FAST
    assert bench.launched == list(TILES), "a file under another name is another search's"
    bench.new_process()
    assert bench.choose() == FAST
    assert bench.launched == []


def test_every_kernel_key_device_and_version_of_triton_is_searched_for_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[Callable[[], Tile]] = [
        lambda: bench.choose("sym"),
        lambda: bench.choose(key=(768, torch.float16)),
        lambda: bench.choose(key=(769, torch.bfloat16)),
        lambda: bench.on("another GPU") or bench.choose(),
        lambda: monkeypatch.setattr(triton, "__version__", "0.0") or bench.choose(),
    ]
    bench.choose()
    for change in changes:
        bench.new_process()
        assert change() == FAST
        assert bench.launched == list(TILES)


def test_other_candidates_are_searched_again(bench: Bench) -> None:
    assert bench.choose() == FAST
    assert bench.choose(tiles=(SLOW, MIDDLE)) == MIDDLE
    bench.new_process()
    assert bench.choose(tiles=(MIDDLE, SLOW)) == MIDDLE
    assert bench.launched == [MIDDLE, SLOW]


def test_without_a_choice_the_first_candidate_is_taken_at_once(
    bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.choose(tiles=(MIDDLE,)) == MIDDLE
    assert bench.choose(device=torch.device("cpu")) == SLOW
    monkeypatch.setattr(tuning, "interpreted", lambda: True)
    assert bench.choose() == SLOW
    assert bench.launched == [] and not cache.exists()


def test_processes_that_must_agree_take_the_first_candidate_whatever_one_of_them_knows(
    bench: Bench, world: Callable[[int], None]
) -> None:
    assert bench.choose() == FAST
    world(2)
    assert bench.choose() == SLOW
    bench.new_process()
    assert bench.choose() == SLOW
    assert bench.launched == []
    world(1)
    assert bench.choose() == FAST


def test_deterministic_algorithms_take_the_first_candidate(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.choose() == FAST
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert bench.choose() == SLOW


def test_nothing_is_timed_while_a_graph_is_captured_and_the_search_comes_later(bench: Bench, cache: Path) -> None:
    bench.capturing = True
    assert bench.choose() == SLOW
    assert bench.launched == [] and not cache.exists()
    bench.capturing = False
    assert bench.choose() == FAST


def test_what_memory_or_the_file_knows_is_taken_into_a_captured_graph(bench: Bench) -> None:
    bench.choose()
    bench.capturing = True
    assert bench.choose() == FAST
    bench.new_process()
    assert bench.choose() == FAST
    assert bench.launched == []


@pytest.mark.parametrize("error", [OutOfResources(300_000, 232_448, "shared memory"), PTXASError("too much shared data")])
def test_a_candidate_the_device_has_not_the_resources_for_is_passed_over_for_good(bench: Bench, error: Exception) -> None:
    bench.times[FAST] = error
    assert bench.choose() == MIDDLE
    bench.new_process()
    assert bench.choose() == MIDDLE
    assert bench.launched == []


def test_if_no_candidate_fits_the_first_error_is_raised_and_nothing_remembered(bench: Bench, cache: Path) -> None:
    bench.times = {tile: OutOfResources(tile.rows, 0, "shared memory") for tile in TILES}
    with pytest.raises(OutOfResources) as raised:
        bench.choose()
    assert raised.value is bench.times[SLOW]
    assert not cache.exists()


def test_any_other_error_is_raised_as_it_comes(bench: Bench, cache: Path) -> None:
    bench.times[FAST] = ValueError("a mistake in the launch")
    with pytest.raises(ValueError, match="a mistake in the launch"):
        bench.choose()
    assert not cache.exists()


def spoilt(whole: dict[str, object], **changes: object) -> bytes:
    return json.dumps({**whole, **changes}).encode()


SPOILT: dict[str, Callable[[dict[str, object]], bytes]] = {
    "empty": lambda whole: b"",
    "cut off": lambda whole: json.dumps(whole).encode()[:-20],
    "no text": lambda whole: b"\xff\xfe\x00",
    "nested without end": lambda whole: b"[" * 100_000,
    "another kind of JSON": lambda whole: b"[1, 2, 3]",
    "another device's": lambda whole: spoilt(whole, device="another GPU"),
    "other candidates'": lambda whole: spoilt(whole, candidates=[[1, 1]] * 3),
    "no times": lambda whole: json.dumps({k: v for k, v in whole.items() if k != "milliseconds"}).encode(),
    "too few times": lambda whole: spoilt(whole, milliseconds=[1.0, 2.0]),
    "times that are text": lambda whole: spoilt(whole, milliseconds=["1.0", "2.0", "3.0"]),
    "a time that is NaN": lambda whole: spoilt(whole, milliseconds=[1.0, float("nan"), 3.0]),
    "no candidate that ran": lambda whole: spoilt(whole, milliseconds=[None, None, None]),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_file_is_as_good_as_none_and_replaced(bench: Bench, cache: Path, kind: str) -> None:
    bench.choose()
    file = only(cache)
    whole = json.loads(file.read_text())
    file.write_bytes(SPOILT[kind](whole))
    bench.new_process()
    assert bench.choose() == FAST
    assert bench.launched == list(TILES)
    assert json.loads(only(cache).read_text()) == whole


def test_a_folder_in_the_files_place_is_as_good_as_none(bench: Bench, cache: Path) -> None:
    bench.choose()
    file = only(cache)
    file.unlink()
    (file / "within").mkdir(parents=True)
    bench.new_process()
    assert bench.choose() == FAST
    assert bench.choose() == FAST
    assert bench.launched == list(TILES), "the choice stays in memory"
    assert only(cache) == file, "no partial file is left"


def test_where_no_folder_can_be_made_the_choice_stays_in_memory(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCHATTEN_CACHE", str(tmp_path / "file"))
    assert bench.choose() == FAST
    assert bench.choose() == FAST
    assert bench.launched == list(TILES)


def test_a_folder_that_may_only_be_read_costs_no_step(bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A mode of the folder would not stop root, as whom tests in containers run.
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tuning.tempfile, "NamedTemporaryFile", refuse)
    assert bench.choose() == FAST
    assert list(cache.iterdir()) == []


def test_a_full_disk_leaves_no_partial_file(bench: Bench, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning.json, "dump", fill)
    assert bench.choose() == FAST
    assert list(cache.iterdir()) == []


def test_the_folder_is_ours_then_the_users_then_that_of_the_home(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value, place in (
        ("SCHATTEN_CACHE", "a", "a/tuning"),
        ("XDG_CACHE_HOME", "b", "b/schatten/tuning"),
        ("HOME", "c", "c/.cache/schatten/tuning"),
    ):
        monkeypatch.setenv(name, str(tmp_path / value))
        bench.new_process()
        assert bench.choose() == FAST
        assert only(tmp_path / place).suffix == ".json"
        monkeypatch.delenv(name)


def test_a_user_without_a_home_has_memory_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(of: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SCHATTEN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert bench.choose() == FAST
    assert bench.choose() == FAST
    assert bench.launched == list(TILES)


def test_the_file_says_what_was_timed(bench: Bench, cache: Path) -> None:
    bench.times[MIDDLE] = OutOfResources(1, 0, "registers")
    bench.choose()
    assert json.loads(only(cache).read_text()) == {
        "device": "GPU of this test",
        "triton": triton.__version__,
        "kernel": "gram",
        "key": "(768, torch.bfloat16)",
        "candidates": [[32, 4], [64, 4], [128, 8]],
        "milliseconds": [3.0, 1.0, None],
    }


WRITER = """
import contextlib, sys, time, torch
from schatten.kernels.triton import tuning
tuning.interpreted = lambda: False
tuning.milliseconds = lambda launch, device: launch()
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.get_device_name = lambda device: "GPU of this test"
print("ready", flush=True)
sys.stdin.readline()
for i in range(300):
    for key in (("shared", i), (sys.argv[1], i)):
        found = tuning.choose("gram", key, ((3, 1), (1, 1), (2, 1)), lambda tile: float(tile[0]), torch.device("cuda", 0))
        assert found == (1, 1), found
"""


def test_processes_that_write_at_the_same_time_lose_nothing_of_each_other(bench: Bench, cache: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("left", "right")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert {file.suffix for file in cache.iterdir()} == {".json"}
    keys = {json.loads(file.read_text())["key"] for file in cache.iterdir()}
    assert keys == {repr((name, i)) for name in ("shared", "left", "right") for i in range(300)}


def test_the_time_is_the_shortest_of_five_launches_queued_behind_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = iter([10.0, 19.0, 27.0, 34.0, 42.0, 51.0])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)
            log.append("mark")

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("pause"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert tuning.milliseconds(lambda: log.append("launch"), GPU) == 7.0
    assert log == ["launch", "pause", "mark", *["launch", "mark"] * 5, "wait"]
