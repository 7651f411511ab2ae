"""A server for the tests of your own code: no Triton, no GPU and no model, and it fails on demand.

It speaks Triton's protocol on a port of this machine, so a client under test does all it does in
production. docs/testing.md shows how, and what the client sees of each fault.
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
