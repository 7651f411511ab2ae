"""Greenlets of gevent or eventlet in the place of threads: calls work, and end in time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from owners import ROOT

pytestmark = pytest.mark.slow

BEGIN = {
    "gevent": "from gevent import monkey; monkey.patch_all(); import clip_rt",
    "gevent after the import": "import clip_rt; from gevent import monkey; monkey.patch_all()",
    "gevent with gRPC's own support": (
        "from gevent import monkey; monkey.patch_all(); "
        "import grpc.experimental.gevent as support; support.init_gevent(); import clip_rt"
    ),
    "eventlet": "import eventlet; eventlet.monkey_patch(); import clip_rt",
}

PROGRAM = """
import os, signal, sys, time, warnings
{begin}
if "gevent" in sys.modules:
    import gevent
    spawn, sleep, join = gevent.spawn, gevent.sleep, lambda job: job.get()
else:
    spawn, sleep, join = eventlet.spawn, eventlet.sleep, lambda job: job.wait()
sys.path.insert(0, sys.argv[2])
from owners import find_processes
with clip_rt.Client(repository=sys.argv[1]) as client:
    jobs = [spawn(client.encode_texts, ["red"]) for _ in range(8)]
    assert all(join(job).shape == (1, 8) for job in jobs)
    (url,) = [each.transport.url for each in client._session.connection.pool.replicas]
    with clip_rt.Client(url, model="tiny") as remote:
        assert remote.encode_texts(["green"]).shape == (1, 8)
    (pid,) = find_processes("bin/tritonserver", os.getpid())
    ticks = []
    def tick():
        while True:
            ticks.append(time.monotonic())
            sleep(0.02)
    spawn(tick)
    os.kill(pid, signal.SIGSTOP)
    start_s = time.monotonic()
    try:
        client.encode_texts(["blue"], timeout_s=1.0)
    except clip_rt.ServerTimeoutError:
        print("late", time.monotonic() - start_s < 2.0, flush=True)
    print("others went on", len(ticks) > 10, flush=True)
    os.kill(pid, signal.SIGKILL)
    # Its gRPC has threads by now, which a fork would not survive.
    print("again", client.encode_texts(["blue"], timeout_s=60.0).shape, flush=True)
"""


@pytest.mark.parametrize("kind", BEGIN)
def test_calls_work_and_end_by_their_deadline(repository: Path, tmp_path: Path, kind: str) -> None:
    if importlib.util.find_spec(kind.split()[0]) is None:
        pytest.skip(f"{kind.split()[0]} is not installed")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", PROGRAM.format(begin=BEGIN[kind])),
            # A copy, or it would join the server that other tests share.
            *(str(shutil.copytree(repository, tmp_path / "models")), str(Path(__file__).parent)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    late, others, again = done.stdout.splitlines()
    assert late == "late True"
    assert again == "again (1, 8)"
    if kind != "eventlet":  # gRPC knows nothing of it: it works, but the others wait.
        assert others == "others went on True"
