"""What can go wrong with a call of the fake server, as data for `fail_next` and `fail_when`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from clip_rt.testing.fake_server import Call, make_answer

Damage = Literal[
    "missing output",
    "another name",
    "another type",
    "too few rows",
    "extra rows",
    "another width",
    "cut short",
    "no bytes",
    "no unit length",
]


@dataclass(frozen=True, kw_only=True)
class Status:
    """The call fails with the status of gRPC that has this name, such as "INVALID_ARGUMENT"."""

    code: str
    message: str = "on purpose"

    def strike(self, answer: Any, call: Call) -> Any:
        """End the call."""
        call.context.abort(grpc.StatusCode[self.code], self.message)


@dataclass(frozen=True, kw_only=True)
class Unavailable(Status):
    """The server is shutting down, or not yet up."""

    code: str = "UNAVAILABLE"
    message: str = "Server is stopping, scheduler for model has stopped accepting requests"


@dataclass(frozen=True, kw_only=True)
class Overloaded(Status):
    """The queue of the server is full."""

    code: str = "UNAVAILABLE"
    message: str = "Exceeds maximum queue size"


@dataclass(frozen=True, kw_only=True)
class Rejected(Status):
    """The server refuses the request as it is."""

    code: str = "INVALID_ARGUMENT"
    message: str = "refused on purpose"


@dataclass(frozen=True)
class Late:
    """The answer comes `delay_s` later than it could."""

    delay_s: float

    def strike(self, answer: Any, call: Call) -> Any:
        """Wait, unless the caller gives up first."""
        call.ended.wait(self.delay_s)
        return answer


@dataclass(frozen=True)
class Hang:
    """No answer comes, until the caller gives up."""

    def strike(self, answer: Any, call: Call) -> Any:
        """Wait for the end of the call."""
        call.ended.wait()
        return answer


@dataclass(frozen=True, kw_only=True)
class Crash:
    """The server dies, and every call on its way with it.

    It comes back at the same address after `back_after_s`; never if that is None.
    """

    back_after_s: float | None = None

    def strike(self, answer: Any, call: Call) -> Any:
        """Take the server down; the call ends by that."""
        die = threading.Thread(target=call.server._crash, args=(self.back_after_s,), daemon=True)
        die.start()
        call.ended.wait()
        return answer


@dataclass(frozen=True)
class Malformed:
    """The answer to an inference breaks the contract in one way."""

    damage: Damage

    def strike(self, answer: Any, call: Call) -> Any:
        """Damage the answer."""
        rows = _read_rows(answer)
        if self.damage == "missing output":
            return service_pb2.ModelInferResponse(model_name=answer.model_name)
        if self.damage == "another name":
            answer.outputs[0].name = "vectors"
        elif self.damage == "another type":
            answer = make_answer(answer.model_name, rows.astype(np.float16), datatype="FP16")
        elif self.damage == "too few rows":
            answer = make_answer(answer.model_name, rows[:-1])
        elif self.damage == "extra rows":
            answer = make_answer(answer.model_name, np.concatenate([rows, rows[:1]]))
        elif self.damage == "another width":
            answer = make_answer(answer.model_name, rows[:, :-1])
        elif self.damage == "cut short":
            answer.raw_output_contents[0] = answer.raw_output_contents[0][:-1]
        elif self.damage == "no bytes":
            del answer.raw_output_contents[:]
        else:
            answer = make_answer(answer.model_name, rows * np.float32(1.01))
        return answer


@dataclass(frozen=True)
class NotFinite:
    """One row of the answer to an inference is all `value`: NaN, an infinity, or 0."""

    value: float = float("nan")
    row: int = 0

    def strike(self, answer: Any, call: Call) -> Any:
        """Overwrite the row."""
        rows = _read_rows(answer).copy()
        rows[self.row] = self.value
        return make_answer(answer.model_name, rows)


def _read_rows(answer: Any) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = np.frombuffer(answer.raw_output_contents[0], "<f4")
    return rows.reshape(answer.outputs[0].shape)
