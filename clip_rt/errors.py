"""Every error this package raises, and nothing else.

ClipRTError
├── InputError (ValueError)             the caller can fix it; carries .index
│   ├── ImageError                      an image that cannot be read or is over a limit
│   ├── TextError                       a text that is not usable
│   │   └── TextTooLongError            carries .num_tokens and .context_length
│   ├── TemplateError                   a prompt template without exactly one {}
│   ├── PolicyError                     a moderation policy that cannot be used; carries .field
│   ├── UnknownModelError               carries .model and .known
│   ├── JobMismatchError                a folder holds another bulk job; .expected and .found
│   └── JobRunningError                 another process writes to the folder of a bulk job
├── ServerError                         the deployment can fix it; carries .url
│   ├── ServerStartError                the embedded server cannot run; carries .log_tail
│   ├── ServerUnavailableError          refused, unresolved, reset, shutting down
│   ├── ServerTimeoutError (TimeoutError)   the deadline passed; carries .timeout_s
│   ├── ServerOverloadedError           the queue is full; back off
│   ├── InferenceError                  the server refused or failed the request; carries .index
│   │   └── MessageTooLongError         one item alone is too much for the server's limit
│   └── ProtocolError                   the answer is malformed
│       └── NonFiniteEmbeddingError     NaN, infinite or zero vectors; carries .index
├── ContractError                       server and client disagree; carries .expected and .found
│   └── ModelReplacedError              other weights came during a call that cannot be made again
├── CheckpointError                     weights that cannot be read or do not fit the architecture
├── TrainingError                       a training run cannot go on
├── ExportError                         a model cannot be compiled here
├── ParityError                         an exported model drifts from its reference; carries .report
├── SearchIndexError                    an index of images is missing, damaged or not ours to read
│   └── SearchIndexLockedError          another process is writing to it
└── ClientClosedError                   the client was used after close()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class ClipRTError(Exception):
    """Base of every error raised by clip_rt, training and export."""

    retryable = False
    """Whether the same call may succeed a little later without any change by the caller."""


class InputError(ClipRTError, ValueError):
    """An argument cannot be used; `index` is its position in the batch, or None."""

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class ImageError(InputError):
    """An image cannot be decoded, has no area, or is over a limit."""


class TextError(InputError):
    """A text is not a usable string."""


class TextTooLongError(TextError):
    """A text needs more tokens than the model reads."""

    def __init__(
        self, message: str, *, index: int | None = None, num_tokens: int, context_length: int
    ) -> None:
        super().__init__(message, index=index)
        self.num_tokens = num_tokens
        self.context_length = context_length


class TemplateError(InputError):
    """A prompt template does not hold exactly one `{}`, or no template has that name."""


class PolicyError(InputError):
    """A moderation policy cannot be read, written or used; `field` says where, or is empty."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class UnknownModelError(InputError):
    """The architecture table, or the server, has no model of that name."""

    def __init__(self, message: str, *, model: str | None, known: Sequence[str]) -> None:
        super().__init__(message)
        self.model = model
        self.known = tuple(known)


class JobMismatchError(InputError):
    """A folder holds a bulk job of another model, other inputs or other settings."""

    def __init__(self, message: str, *, expected: object, found: object) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class JobRunningError(InputError):
    """Another process is at work on a bulk job; there is one at a time."""


class ServerError(ClipRTError):
    """Something went wrong at or on the way to the server at `url`."""

    def __init__(self, message: str, *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class ServerStartError(ServerError):
    """The embedded server is not installed, cannot start, or died; `log_tail` is its log's end."""

    def __init__(self, message: str, *, url: str | None = None, log_tail: str = "") -> None:
        super().__init__(message, url=url)
        self.log_tail = log_tail


class ServerUnavailableError(ServerError):
    """No server answers at that address, or it is shutting down."""

    retryable = True

    def __init__(self, message: str, *, url: str | None = None, was_reached: bool = False) -> None:
        super().__init__(message, url=url)
        self.was_reached = was_reached
        """Whether the server may have seen the request, so that trying again is work for it."""


class ServerTimeoutError(ServerError, TimeoutError):
    """The deadline of the call passed before the server answered."""

    def __init__(self, message: str, *, url: str | None = None, timeout_s: float) -> None:
        super().__init__(message, url=url)
        self.timeout_s = timeout_s


class ServerOverloadedError(ServerError):
    """The server is healthy but its queue is full."""

    retryable = True


class InferenceError(ServerError):
    """The server received the request and refused it or failed; the message is the server's.

    `index` is the item it was about, where that is known.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str | None = None,
        index: int | None = None,
        may_be_one_item: bool = False,
    ) -> None:
        super().__init__(message, url=url)
        self.index = index
        self.may_be_one_item = may_be_one_item
        """Whether the rest of the batch may pass without the item it is about."""


class MessageTooLongError(InferenceError):
    """The server, or a proxy before it, accepts no message as long as this one."""


class ProtocolError(ServerError):
    """The answer has a wrong name, shape, dtype or number of rows."""


class NonFiniteEmbeddingError(ProtocolError):
    """The server answered NaN, infinite or zero vectors; row `index` is the first."""

    def __init__(self, message: str, *, url: str | None = None, index: int) -> None:
        super().__init__(message, url=url)
        self.index = index


class ContractError(ClipRTError):
    """The server's model is not the one that was asked for."""

    def __init__(self, message: str, *, expected: object, found: object) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class ModelReplacedError(ContractError):
    """The servers came back with other weights while a call was under way.

    A call that does not insist on a fingerprint is made again by itself, on the new weights; this
    is raised where it cannot be.
    """


class CheckpointError(ClipRTError):
    """Weights are unreadable, unsafe to read, or do not fit the architecture."""


class TrainingError(ClipRTError):
    """A training run diverges or cannot go on; what was saved stays and can be resumed."""


class ExportError(ClipRTError):
    """A model cannot be compiled: software or a GPU is missing, or the compiler refuses it."""


class ParityError(ClipRTError):
    """An exported model differs from its reference by more than the stated tolerance."""

    def __init__(self, message: str, *, report: Mapping[str, object]) -> None:
        super().__init__(message)
        self.report = report


class SearchIndexError(ClipRTError):
    """An index of images is not there, is damaged, or was written by a later version."""


class SearchIndexLockedError(SearchIndexError):
    """Another process is writing to the index; reading it goes on meanwhile."""

    retryable = True


class ClientClosedError(ClipRTError):
    """The client was closed; make a new one."""
