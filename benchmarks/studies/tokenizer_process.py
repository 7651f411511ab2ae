"""A new process that asks a server for its tokenizer and reads labels: `studies.tokenizers`.

It imports nothing before it times the import of clip_rt.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(url: str, labels_file: str) -> None:
    """Print as JSON what each step took, in seconds."""
    labels: dict[str, list[str]] = json.loads(Path(labels_file).read_text("utf-8"))
    found: dict[str, float] = {}
    start_s = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal start_s
        found[name] = time.perf_counter() - start_s
        start_s = time.perf_counter()

    import clip_rt
    from clip_rt import served_tokenizer
    from clip_rt.inputs.tokenizer_file import FileTokenizer

    found["imports of tokenizers by clip_rt"] = float("tokenizers" in sys.modules)
    lap("import")
    load = FileTokenizer.__init__

    def load_timed(*arguments: object, **named: object) -> None:
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        load(*arguments, **named)  # type: ignore[arg-type]
        found["load"] = time.perf_counter() - begun_s
        found["load, processor time"] = time.process_time() - begun_cpu_s

    FileTokenizer.__init__ = load_timed  # type: ignore[method-assign]
    with clip_rt.Client(url, model="gemma", timeout_s=60) as client:
        assert client.manifest.tokenization.kind == "tokenizer.json"
        lap("connect")
        read = client._session.call("load_tokenizer", None, served_tokenizer.load_tokenizer)
        lap("tokenizer")
        for name, texts in labels.items():
            for turn in ("first", "again"):
                for text in texts:
                    read.encode_text(text, truncate=True)
                lap(f"{name}, {turn}")
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
