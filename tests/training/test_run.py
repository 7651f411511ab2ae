import json
from pathlib import Path

import pytest
from safetensors import safe_open

from clip_rt.errors import InputError
from training.run import TrainConfig, main


def test_a_short_run_learns_and_leaves_what_the_next_step_needs(tmp_path: Path) -> None:
    config = TrainConfig(
        sample=True, out_dir=tmp_path, batch_size=32, total_steps=12, warmup_steps=2,
        log_every_steps=1, eval_every_steps=12,
    )  # fmt: skip
    main(config)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert set(lines[-1]) >= {"top1_openmoji", "top1_openmoji-black"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "checkpoint.safetensors", framework="numpy") as file:
        assert file.metadata()["architecture"] == "RN26@64px"
        assert file.metadata()["step"] == "12"
        assert "visual.attnpool.c_proj.weight" in file.keys()  # noqa: SIM118 - not a dict
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors", "curves.png", "log.jsonl",
    ]  # fmt: skip


def test_missing_data_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.drawings"):
        main(TrainConfig(data_dir=tmp_path, out_dir=tmp_path / "out"))


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"emoji_fraction": 1.5}])
def test_a_wrong_configuration_names_the_field(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        TrainConfig(**wrong)
