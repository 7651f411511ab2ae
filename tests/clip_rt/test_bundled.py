"""Where the bundled model is found, and what is said where it is not installed."""

from pathlib import Path

import pytest

import clip_rt
from clip_rt.__main__ import main
from clip_rt.embedded import bundled

CHECKOUT = Path(__file__).resolve().parents[2]
FINDERS = {"model_repository": bundled.find_model_repository, "sample": bundled.find_sample}


@pytest.fixture
def installed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages without a checkout around them."""
    monkeypatch.setattr(bundled, "CHECKOUT", tmp_path)
    monkeypatch.setattr(bundled, "PACKAGE", "some_drawings")
    monkeypatch.delenv("CLIP_RT_REPOSITORY", raising=False)
    monkeypatch.delenv("CLIP_RT_URL", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_checkout_serves_its_own() -> None:
    assert bundled.find_model_repository() == CHECKOUT / "model_repository"
    assert bundled.find_sample() == CHECKOUT / "training/sample"


@pytest.mark.parametrize("name", FINDERS)
def test_elsewhere_the_package_of_data_has_them(installed_elsewhere: Path, name: str) -> None:
    package = installed_elsewhere / "some_drawings"
    (package / name).mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('not to be imported')")
    assert FINDERS[name]() == package / name


@pytest.mark.usefixtures("installed_elsewhere")
def test_a_client_without_it_says_what_to_install() -> None:
    with pytest.raises(clip_rt.ServerStartError, match=r"pip install 'clip-rt\[server\]'"):
        clip_rt.Client().encode_texts("a")


@pytest.mark.usefixtures("installed_elsewhere")
def test_training_without_the_sample_says_what_to_install() -> None:
    with pytest.raises(clip_rt.InputError, match="pip install clip-rt-drawings"):
        bundled.find_sample()


@pytest.mark.usefixtures("installed_elsewhere")
def test_doctor_reports_it_as_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1
    assert "fail  models: no server" in capsys.readouterr().out
