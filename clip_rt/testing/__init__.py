"""A server for the tests of your own code: no Triton, no GPU and no model, and it fails on demand.

It speaks Triton's protocol on a port of this machine, so a client under test does all it does in
production: it decodes, tokenises, sends, checks, retries and gives up.

    from clip_rt import testing

    with testing.FakeServer(model="shop-v3", embedding_dim=512) as server:
        with clip_rt.Client(server.url) as client:
            server.teach("tests/cat.jpg", "a photo of a cat.")
            assert client.zero_shot("tests/cat.jpg", ["cat", "dog"]).best == ["cat"]

            server.fail_next(testing.Unavailable(), times=2)
            client.encode_texts(["red"])                    # retried; nobody noticed
            assert server.num_calls["ModelInfer"] == 5

            server.fail_next(testing.Hang())
            with pytest.raises(clip_rt.ServerTimeoutError):
                client.encode_texts(["blue"], timeout_s=0.5)

Equal images and equal texts have equal embeddings, in every process and on every machine; unlike
ones are nearly orthogonal. `embed_image` and `embed_text` choose others.

What can go wrong, as data for `fail_next` and `fail_when`:

| fault | what the client sees |
|---|---|
| `Status(code=..., message=...)` | any status of gRPC |
| `Unavailable()` | a server that is shutting down |
| `Overloaded()` | a full queue |
| `Rejected()` | a request that the server refuses |
| `Late(delay_s)` | an answer that takes its time |
| `Hang()` | no answer at all |
| `Malformed(damage)` | an answer that breaks the contract |
| `NotFinite(value, row=...)` | NaN, an infinity or zeros for one row |
| `Crash(back_after_s=...)` | a server that dies with its connections, and may come back |

`stop`, `start` and `swap_weights` do to the server what a deployment does. A fault of your own is
any object with the method that `Fault` names.
"""

from clip_rt.testing.fake_model import EmbedImage, EmbedText
from clip_rt.testing.fake_server import Call, FakeServer, Fault, Request
from clip_rt.testing.faults import (
    Crash,
    Damage,
    Hang,
    Late,
    Malformed,
    NotFinite,
    Overloaded,
    Rejected,
    Status,
    Unavailable,
)

__all__ = [
    "Call",
    "Crash",
    "Damage",
    "EmbedImage",
    "EmbedText",
    "FakeServer",
    "Fault",
    "Hang",
    "Late",
    "Malformed",
    "NotFinite",
    "Overloaded",
    "Rejected",
    "Request",
    "Status",
    "Unavailable",
]
