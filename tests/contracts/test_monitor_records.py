"""What Monitor has found can be read back: from files, TensorBoard, alarms and tables."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

import schatten
from schatten.monitor import Alarm, JSONLines, Monitor, TensorBoard
from tests.contracts.monitoring import Reads, one_matrix, stepped


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_json_lines_are_appended_and_undefined_numbers_are_null(tmp_path):
    file = tmp_path / "new" / "run.jsonl"
    W, opt = one_matrix()
    with Monitor(opt, 1, ["gradient"], to=file):
        stepped(opt, W, 1)
        W.grad = torch.full_like(W, math.inf)
        opt.step()
        assert len(lines(file)) == 2, "written at once"
    with Monitor(opt, 1, ["gradient"], to=str(file)):
        stepped(opt, W, 1)
    assert [record["step"] for record in lines(file)] == [1, 2, 3]
    assert lines(file)[1]["gradient/frobenius"] is None and lines(file)[0]["gradient/frobenius"] > 0


def test_a_line_that_was_cut_by_a_kill_spoils_only_itself(tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "na')
    JSONLines(file).write([{"step": 3, "name": "W"}])
    assert file.read_text().splitlines()[2] == '{"step": 3, "name": "W"}'
    JSONLines(file)
    assert file.read_text().count("\n") == 3


def test_several_writers_get_the_same_records(tmp_path):
    W, opt = one_matrix()
    seen = []
    with Monitor(opt, 1, ["update"], to=[tmp_path / "run.jsonl", seen.append]) as monitor:
        stepped(opt, W, 1)
    assert seen == lines(tmp_path / "run.jsonl") == monitor.records


class Vectors(Reads):
    """A list of numbers for each block."""

    def __call__(self, of):
        return {"values": torch.linalg.svdvals(of.weight)}


def test_lists_of_numbers_are_written_as_such(tmp_path):
    W, opt = one_matrix()
    expected = torch.linalg.svdvals(W.detach().clone())
    with Monitor(opt, 1, [Vectors()], to=tmp_path / "run.jsonl"):
        stepped(opt, W, 1)
    assert lines(tmp_path / "run.jsonl")[0]["reads/values"] == pytest.approx(expected.tolist())


def test_tensorboard_gets_scalars_and_histograms_by_quantity_and_parameter(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'schatten[lab]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    W, opt = one_matrix()
    own = SummaryWriter(str(tmp_path / "own"))
    with Monitor(opt, 1, ["update", "spectrum", Vectors()], to=[tmp_path / "board", own]) as monitor:
        stepped(opt, W, 2)
    own.add_scalar("still open", 1.0, 0)
    own.close()
    for folder in ("board", "own"):
        events = EventAccumulator(str(tmp_path / folder), {"histograms": 0})
        events.Reload()
        assert [event.step for event in events.Scalars("update/rms/W")] == [1, 2]
        assert events.Scalars("update/rms/W")[1].value == pytest.approx(monitor.records[0]["update/rms"])
        assert len(events.Histograms("reads/values/W")) == 2
        binned = events.Histograms("spectrum/weight_histogram/W")[1].histogram_value
        assert sum(binned.bucket) == 4 and (binned.min, binned.max) == (-4.0, 4.0), "log10 of singular values"


def test_without_tensorboard_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install 'schatten"):
        TensorBoard(tmp_path)


@pytest.mark.parametrize("to, error", [("run.csv", ValueError), ("", ValueError), (3, TypeError), ([3], TypeError)])
def test_what_nothing_can_be_written_to_is_refused(to, error):
    with pytest.raises(error, match=r"to must be a path ending in \.jsonl, a folder for TensorBoard"):
        Monitor(one_matrix()[1], 1, ["update"], to=to)


class Growing(Reads):
    """Alarms where the weight's norm has grown."""

    def alarm(self, previous, now):
        return f"norm grew from {previous['norm']:.3g}" if now["norm"] > previous["norm"] else None


def test_an_alarm_is_warned_of_once_for_each_matrix_and_recorded_each_time():
    W, opt = one_matrix(lr=0.5, weight_decay=0.0)
    V = nn.Parameter(torch.zeros(3, 3))
    opt.add_param_group({"params": [("V", V)]})
    seen = []
    with Monitor(opt, 1, [Growing()], to=seen.append) as monitor:
        for step in range(4):
            W.grad, V.grad = -W.detach(), None
            if step:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    opt.step()
                assert [w.category for w in caught] == ([Alarm] if step == 1 else [])
                assert step > 1 or "W, step 2, reads: norm grew" in str(caught[0].message)
            else:
                opt.step()
        assert str(monitor).splitlines()[-1].startswith("W: norm grew")
    assert ["reads/alarm" in record for record in seen if record["name"] == "W"] == [False, True, True, True]
    assert not any("reads/alarm" in record for record in seen if record["name"] == "V")


def test_the_constraint_calls_when_a_weight_outside_its_ball_is_carried_further_out():
    W, opt = one_matrix(lr=0.01, weight_decay=0.5)
    with torch.no_grad():
        W.mul_(100)
    with Monitor(opt, 1, ["constraint"]) as monitor:
        stepped(opt, W, 2)  # decay takes it in, whatever the gradients
        assert not any("constraint/alarm" in record for record in monitor.records)
        with torch.no_grad():
            W.mul_(2)
        with pytest.warns(Alarm, match="W, step 3, constraint: .*V_B grew"):
            stepped(opt, W, 1)


def test_the_table_has_the_largest_first_of_the_column_that_is_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = schatten.Muon(model)
    with Monitor(opt, 1, ["gradient", "update"]) as monitor:
        assert str(monitor) == "Nothing has been measured yet."
        model[0].weight.grad, model[1].weight.grad = torch.eye(4), 2 * torch.eye(4)
        opt.step()
        first = str(monitor).splitlines()
        assert first[0].startswith("gradient, step 1") and first[1].startswith("1.weight") and first[2].startswith("0.weight")
        assert "and 1 more: monitor.table(shown=None)" in monitor.table(shown=1)
        assert monitor.table(by="update/rms").count("weight") == 4
        with pytest.raises(ValueError, match="by must be one of gradient/frobenius"):
            monitor.table(by="gradient")
