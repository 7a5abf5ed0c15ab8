"""The law of the experiments' folder: settings that make flags, checks that are functions of rows, a page that says what the
recorded rows say."""

import dataclasses
import json
import random
import re
import typing
from pathlib import Path

import pytest

from schatten.lab import experiments, reproduction
from schatten.lab.experiment import NOT_REPRODUCED, OUT_OF_REACH, REPRODUCED
from schatten.lab.lab_commands import configured
from schatten.lab.ledger import flat, raw_rows, rows_of
from schatten.lab.store import encoded

NAMES = experiments.names()
RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "lab"
PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def experiment(name):
    return experiments.load(name)


@pytest.fixture
def rows(name):
    return rows_of(RECORDED / name)


def test_all_named_experiments_are_here():
    named = """convex-maps coupled-newton critical-batch error-feedback fanions latent-attention-moe lion-rate muon-vs-gd
        preconditioning spectral-ball spectral-powers trust-region variance-reduction width-transfer zero-order"""
    assert NAMES == sorted(named.split())


def test_the_first_line_of_the_file_asks_a_question(name, experiment):
    assert experiments.claim(name).rstrip().endswith("?")
    # A page and more than a title: claim, source, what is ours.
    assert len(experiments.text(name).splitlines()) >= 5
    assert experiment.source


def test_both_configurations_are_values_of_one_frozen_dataclass_whose_fields_have_help(experiment):
    kind = type(experiment.quick)
    assert type(experiment.full) is kind and dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name != "seeds":
            assert field.metadata.get("help"), field.name
        base = [k for k in (typing.get_args(hints[field.name]) or (hints[field.name],)) if k not in (type(None), Ellipsis)]
        assert set(base) <= {int, float, str, bool}, (field.name, hints[field.name])
    for config in (experiment.quick, experiment.full):
        # Settings are compared as JSON when a run is taken up again.
        plain = json.loads(json.dumps(encoded(dataclasses.asdict(config))))
        assert plain.keys() == dataclasses.asdict(config).keys()


def test_a_setting_that_is_given_replaces_that_of_either_size(experiment):
    for full in (False, True):
        assert configured(experiment, full, {"seeds": 7}).seeds == 7
        assert configured(experiment, full, {"seeds": None}) == (experiment.full if full else experiment.quick)


def test_without_rows_there_is_no_verdict_that_anything_was_reproduced(experiment):
    assert all(verdict.verdict == OUT_OF_REACH for verdict in experiment.check([]))
    assert experiment.pictures([]) is not None


def test_recorded_rows_are_of_the_quick_size_and_carry_config_versions_and_device(name, experiment):
    rows = raw_rows(RECORDED / name)
    assert rows
    assert reproduction.size(experiment, rows) == "quick"
    for row in rows:
        assert row["run"].keys() >= {"config", "versions", "device", "machine", "commit", "seconds"}
        assert row["run"]["config"] == rows[0]["run"]["config"]
    # Every case once.
    cases = [json.dumps(row["case"], sort_keys=True) for row in rows]
    assert len(set(cases)) == len(cases)


def test_checks_are_pure_functions_of_the_rows(experiment, rows):
    before = json.dumps(encoded(rows), sort_keys=True)
    first = experiment.check(rows)
    assert first and first == experiment.check(rows)
    assert json.dumps(encoded(rows), sort_keys=True) == before
    for verdict in first:
        assert verdict.verdict in (REPRODUCED, NOT_REPRODUCED, OUT_OF_REACH)
        assert all(getattr(verdict, field.name).strip() for field in dataclasses.fields(verdict))


def test_checks_and_pictures_take_the_rows_of_an_interrupted_run(experiment, rows):
    generator = random.Random(0)
    for share in (0.1, 0.5, 0.9):
        some = rows[: int(share * len(rows))]
        assert isinstance(experiment.check(some), list)
        experiment.pictures(some)
    # Not only a beginning: settings can leave out any case.
    assert isinstance(experiment.check(generator.sample(rows, len(rows) // 2)), list)


def test_every_picture_has_a_caption(experiment, rows):
    figures = experiment.pictures(rows)
    assert set(figures) <= set(experiment.captions)
    assert all(re.fullmatch(r"[a-z0-9_-]+", picture) for picture in figures)


def test_the_page_says_what_the_recorded_rows_say(tmp_path):
    written = reproduction.write_page(RECORDED, tmp_path / "reproduction.md")
    assert written.read_text() == PAGE.read_text(), "run: schatten lab report --runs benchmarks/results/lab"
    for picture in (tmp_path / "images").iterdir():
        assert (PAGE.parent / "images" / picture.name).exists()


def test_rows_keep_case_findings_and_stamp_apart():
    row = {"case": {"lr": 0.1, "seed": 0}, "found": {"loss": "inf", "curve": [1.0, "nan"]}, "run": {"seconds": 1}}
    found = flat(row)
    assert found["lr"] == 0.1 and found["loss"] == float("inf") and found["curve"][1] != found["curve"][1]
    assert found["run"] == {"seconds": 1}
