import json
from pathlib import Path

from training.curves import draw_curves
from training.journal import Journal, read_journal


def test_a_resumed_run_drops_what_its_earlier_life_wrote_of_later_steps(tmp_path: Path) -> None:
    first = Journal(tmp_path, step=0, num_steps=10)
    for step in range(1, 8):
        first.write(step, loss=1.0 / step)
    first.close()
    with first.path.open("a") as file:
        file.write('{"step": 8, "lo')  # cut short by a kill
    second = Journal(tmp_path, step=5, num_steps=10, elapsed_s=100.0)
    second.write(6, loss=0.5)
    second.close()
    lines = read_journal(second.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] == 0.5
    assert lines[-1]["elapsed_s"] >= 100.0


def test_a_silent_journal_writes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, step=0, num_steps=10, tensorboard=True, silent=True)
    journal.write(1, loss=1.0)
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path) -> None:
    journal = Journal(tmp_path, step=0, num_steps=10, tensorboard=True)
    journal.write(3, loss=0.25, skipped="not finite")
    journal.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("loss")
    assert (scalar.step, scalar.value) == (3, 0.25)
    assert events.Tags()["scalars"] == ["loss"]


def test_the_curves_are_drawn_while_a_run_writes(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [{"step": s, "loss": 1.0, "batch_accuracy": 0.5, "top1_openmoji": 0.1} for s in (1, 2)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "l')
    draw_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
