"""What `clip-rt embed` says: progress, and what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bulk_pictures import write_pictures

import clip_rt
from clip_rt import bulk
from clip_rt.bulk import Progress
from clip_rt.commands.embed import describe
from clip_rt.errors import InputError

ROOT = Path(__file__).parents[2]
WITHOUT = """if True:
    import sys
    class Gone:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {"httpx", "pyarrow", "ray", "rich"}:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Gone())
"""


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress(num_listed=1234, is_listed=False), "1,234 found"),
        (Progress(num_listed=0, is_listed=True), "0 of 0 (100.0%), 0 bad"),
        (
            Progress(num_listed=2000, is_listed=True, num_done=500, num_failed=2),
            "500 of 2,000 (25.0%), 2 bad",
        ),
        (
            Progress(num_listed=10_000, is_listed=True, num_done=2800, num_now=400, seconds=200),
            "2,800 of 10,000 (28.0%), 2/s, 1:00:00 left, 0 bad",
        ),
    ],
)
def test_progress_has_a_rate_and_the_time_that_is_left(progress, words):
    assert describe(progress) == words


def run_without(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + program],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_is_missing_is_one_sentence(tmp_path):
    done = run_without(
        "    import clip_rt.bulk.sources\n"
        "    from clip_rt.__main__ import main\n"
        f"    main(['embed', {str(tmp_path)!r}, '--out', {str(tmp_path / 'out')!r}])\n"
    )
    assert done.returncode == 2
    assert done.stderr == "error: bulk embedding needs pyarrow: pip install 'clip-rt[commands]'.\n"
    done = run_without(
        "    from clip_rt.ray import embed_dataset\n"
        "    try: embed_dataset(None)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
    )
    assert done.stdout == (
        "InputError embedding datasets of Ray needs ray: pip install 'clip-rt[ray]'.\n"
    )


def test_help_needs_none_of_it():
    done = run_without("    from clip_rt.__main__ import main\n    main(['embed', '--help'])\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--partition-items" in done.stdout


def test_urls_need_a_host_that_is_allowed_before_anything_is_embedded(tmp_path):
    write_pictures(tmp_path / "pictures", 2)
    inputs = [str(tmp_path / "pictures"), "https://images.example/0.jpg"]
    with (
        clip_rt.Client(server="in_process") as client,
        pytest.raises(InputError, match=r"'https://images\.example/0\.jpg' is a URL, and none are"),
    ):
        bulk.embed(inputs, tmp_path / "out", client)
    assert not (tmp_path / "out/embeddings").exists()
