"""Images and texts in, embeddings and zero-shot scores out; what this package is for.

Checks what callers pass; `session` has the connection, and `embedding` does the work.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from clip_rt import embedding, telemetry
from clip_rt.cache.memory import PromptCache
from clip_rt.classification import open_set
from clip_rt.classification.probe import Probe
from clip_rt.classification.zero_shot import Scores
from clip_rt.deadline import START_TIMEOUT_S, Deadline, check_timeout
from clip_rt.embedding import ImageOptions
from clip_rt.errors import InputError
from clip_rt.inputs import prompts, tokenizer
from clip_rt.inputs.decoding import MAX_BYTES, MAX_PIXELS, Decode
from clip_rt.inputs.images import Images
from clip_rt.inputs.items import OnError, check_on_error, check_whole_number
from clip_rt.moderation import decisions
from clip_rt.moderation.decisions import Moderation
from clip_rt.moderation.policy import Policy
from clip_rt.requests.connection import Model
from clip_rt.requests.results import Encoded, HiddenStates
from clip_rt.session import ServerKind, Session, Target
from clip_rt.specs import HIDDEN_STATES, HiddenLayer
from clip_rt.wire.channel import TLS, split_urls
from clip_rt.wire.manifest import Manifest

CACHE_VARIABLE = "CLIP_RT_CACHE_DIR"

TIMEOUT_S = 30.0
CACHE_BYTES = 64 * 1024**2
"""Room for some 25,000 class embeddings of 512 numbers."""


class Client:
    """A CLIP model on a Triton server, or on one of its own that it starts on this machine.

    Constructing does no I/O; the first call connects. Thread-safe. A forked child opens its own
    connection, and a pickled client carries its configuration only. `close` it, or use it in a
    `with` statement.

    Args:
        url: host:port of Triton's gRPC endpoint, or grpcs://host:port for TLS; or several, of
            replicas that serve the same model; dns:///name:port asks in turn all the servers that
            a name stands for. Which of those answers is not known, so all must have the same
            weights; servers that are listed are held to that. Without it: the embedded server over
            `repository` if that is given, else the addresses in $CLIP_RT_URL, separated by commas,
            else the embedded server over $CLIP_RT_REPOSITORY or the bundled model.
        model: Name the model was exported under. Without it: the only one there is.
        repository: Folder of models for the embedded server.
        server: What runs the models of a repository: "embedded" is a Triton on loopback,
            "in_process" is this process, for notebooks and command lines; "auto" is the first,
            where it is installed.
        timeout_s: Longest time a call may take, unless it says otherwise; infinity is allowed.
            Starting the embedded server comes on top, at the first call.
        start_timeout_s: Longest wait for the embedded server to load its models.
        fingerprint: Insist on these weights, as `manifest.fingerprint` names them.
        exif: Turn photographs upright as their EXIF orientation says; see `images.prepare` for
            which images have one.
        max_pixels: Largest width x height of an image, read from its header. A picture takes 4
            bytes a pixel while it is decoded, on each core.
        max_bytes: Largest encoded size of an image.
        decode: "exact", or "fast" for large JPEGs decoded at a smaller scale, nearly the same; see
            `images.prepare`.
        dimensions: Of all calls that say nothing else; see `encode_images`.
        headers: Sent with every request, to say who asks; never logged or shown.
        tls: How to trust a grpcs:// server, and a certificate of one's own.
        cache_bytes: Memory for class embeddings; 0 turns it off.
        cache_dir: Folder where class embeddings outlive this process, shared by any number of
            them. Without it: $CLIP_RT_CACHE_DIR, else none.

    Raises:
        InputError: an argument cannot be used.
    """

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        repository: str | os.PathLike[str] | None = None,
        server: ServerKind = "auto",
        timeout_s: float = TIMEOUT_S,
        start_timeout_s: float = START_TIMEOUT_S,
        fingerprint: str | None = None,
        exif: bool = True,
        max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
        decode: Decode = "exact",
        dimensions: int | None = None,
        headers: Mapping[str, str] | None = None,
        tls: TLS | None = None,
        cache_bytes: int = CACHE_BYTES,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if url is not None and repository is not None:
            raise InputError("url and repository exclude each other; name a server or a folder.")
        urls = None if url is None else split_urls(url)
        if repository is not None and not isinstance(repository, (str, os.PathLike)):
            raise InputError(f"repository is a {type(repository).__name__}; name a folder.")
        if not isinstance(cache_dir, (str, os.PathLike, NoneType)):
            raise InputError(f"cache_dir is a {type(cache_dir).__name__}; name a folder.")
        if type(cache_bytes) is not int or cache_bytes < 0:
            raise InputError(f"cache_bytes is {cache_bytes!r:.80}; it must be 0 or more.")
        if dimensions is not None:
            check_whole_number(dimensions, "dimensions")
        check_timeout(timeout_s)
        check_timeout(start_timeout_s, "start_timeout_s")
        self._target = Target(
            urls=urls,
            repository=None if repository is None else Path(repository),
            model=model,
            fingerprint=fingerprint,
            headers={} if headers is None else headers,
            tls=tls,
            start_timeout_s=start_timeout_s,
            server=server,
        )
        self._timeout_s = timeout_s
        self._dimensions = dimensions
        self._image_options = ImageOptions(
            exif=exif, max_pixels=max_pixels, max_bytes=max_bytes, decode=decode
        )
        self._cache_bytes = cache_bytes
        folder = cache_dir or os.environ.get(CACHE_VARIABLE) or None
        self._cache_dir = None if folder is None else Path(folder)
        self._open()

    def _open(self) -> None:
        self._session = Session(self._target, self._timeout_s)
        self._embed_images = partial(embedding.embed_images, options=self._image_options)
        self._cache = PromptCache(self._cache_bytes, self._cache_dir)
        self._embed_classes = partial(embedding.embed_classes, cache=self._cache)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        target = self._target
        place = ", ".join(target.urls or ()) or target.repository or "default"
        return f"Client({str(place)!r}, model={target.model!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_session", "_cache", "_embed_images", "_embed_classes")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    @property
    def manifest(self) -> Manifest:
        """What the server says about the model; connects if needed.

        Raises:
            ServerError, UnknownModelError, ContractError: see `encode_images`.
        """
        with self._session.begun(None) as (model, _):
            return model.manifest

    def list_models(self, *, timeout_s: float | None = None) -> tuple[str, ...]:
        """Return the names of all models that the server has, any of which is a `model=`.

        Raises:
            ServerError, ClientClosedError: see `encode_images`.
        """
        return self._session.list_models(timeout_s)

    @property
    def cache(self) -> PromptCache:
        """Class embeddings that are kept: how many, how often they were of use; `clear()`."""
        return self._cache

    @overload
    def encode_images(
        self,
        images: Images,
        *,
        on_error: Literal["raise"] = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode_images(
        self,
        images: Images,
        *,
        on_error: Literal["skip"],
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> Encoded: ...

    def encode_images(
        self,
        images: Images,
        *,
        on_error: OnError = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32] | Encoded:
        """Embed images.

        Any number of them: they are read, prepared and sent a batch at a time, on all cores, so
        that a generator of thousands needs the memory of a few. Equal images are sent once.

        Args:
            images: Paths, encoded bytes, open files, Pillow images, uint8 arrays or tensors
                (H, W, 3), in any mixture; one image alone is a batch of one, (N, H, W, 3) of N.
            on_error: "raise" the first error, or "skip" images that cannot be used.
            dimensions: Numbers of each embedding to keep, the first ones, normalised again: one of
                `manifest.matryoshka_dimensions`; the client's own, or else all, if None.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the images. N = 0 gives (0, D).
            With `on_error="skip"` the rows of those that could be used, and the failures.

        Raises:
            ImageError: an image cannot be used; carries its index.
            InferenceError, NonFiniteEmbeddingError: the server cannot embed it; the same.
            InputError: the model was not trained for such dimensions.
            ServerError: the server cannot be started, reached or used; see `errors`.
            UnknownModelError: the server does not have the model.
            ContractError: it has another one than was asked for.
            ClientClosedError: the client was closed.
        """
        check_on_error(on_error)

        kept = self._dimensions if dimensions is None else dimensions
        embed = partial(self._embed_images, images=images, on_error=on_error, dimensions=kept)
        encoded = self._session.call("encode_images", timeout_s, embed, images)
        return encoded if on_error == "skip" else encoded.embeddings

    def stream_images(
        self,
        images: Images,
        *,
        on_error: OnError = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> Generator[Encoded, None, None]:
        """Embed any number of images, in parts, as they come back; memory stays flat.

        Args:
            images: As for `encode_images`; a generator is read as parts are asked for.
            on_error: As for `encode_images`.
            dimensions: As for `encode_images`.
            timeout_s: Longest time for one part, not for all; the client's own if None.

        Yields:
            The embeddings of the next images, with their positions among all.

        Raises:
            ImageError, InputError, ServerError, UnknownModelError: see `encode_images`.
            ContractError, ClientClosedError: see there.
        """
        check_on_error(on_error)
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        kept = self._dimensions if dimensions is None else dimensions
        parts = self._stream_images(images, on_error, timeout_s, kept)
        return telemetry.stream("stream_images", parts)

    @overload
    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["raise"] = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: Literal["skip"],
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> Encoded: ...

    def encode_texts(
        self,
        texts: tokenizer.Texts,
        *,
        truncate: bool = False,
        on_error: OnError = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32] | Encoded:
        """Embed texts as they are, without a template. Equal texts are sent once.

        Args:
            texts: A list of strings, as `items` has it; one string alone is a batch of one.
            truncate: Cut texts that are too long for the model instead of refusing them.
            on_error: "raise" the first error, or "skip" texts that cannot be used.
            dimensions: As for `encode_images`.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, D), rows of length 1, in the order of the texts. N = 0 gives (0, D).
            With `on_error="skip"` the rows of those that could be used, and the failures.

        Raises:
            TextTooLongError: a text has too many tokens; carries its index.
            TextError: a text cannot be used; carries its index.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)

        kept = self._dimensions if dimensions is None else dimensions
        embed = partial(
            embedding.embed_texts,
            texts=texts,
            on_error=on_error,
            truncate=truncate,
            dimensions=kept,
        )
        encoded = self._session.call("encode_texts", timeout_s, embed, texts)
        return encoded if on_error == "skip" else encoded.embeddings

    def encode_text_hidden(
        self,
        texts: tokenizer.Texts,
        *,
        layer: HiddenLayer = "last",
        pad_id: int | None = None,
        truncate: bool = False,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> HiddenStates:
        """Return the hidden states of texts, as pipelines of diffusion models read them.

        The model must have been exported with `--text-output hidden`. Each text is filled up to the
        context length; those positions have hidden states too, which depend on `pad_id`. Equal
        texts are sent once.

        Args:
            texts: As for `encode_texts`; one may be empty, as a negative prompt is.
            layer: "last", behind the final LayerNorm; "penultimate", behind the block before the
                last, as it is; "penultimate_norm", the same through the final LayerNorm.
            pad_id: What a text is filled up with; what the manifest says if None.
            truncate: Cut texts that are too long for the model instead of refusing them.
            on_error: "raise" the first error, or "skip" texts that cannot be used.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (N, L, W), with which positions are of the text, and the projected embeddings,
            (N, D), in the order of the texts.

        Raises:
            TextTooLongError, TextError: a text cannot be used; carries its index.
            InputError: another argument cannot be used.
            UnknownModelError: the server has the model without its hidden states.
            ServerError, ContractError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)
        if layer not in HIDDEN_STATES:
            raise InputError(
                f"layer is {layer!r:.40}; it must be one of {', '.join(map(repr, HIDDEN_STATES))}."
            )
        embed = partial(
            embedding.embed_hidden,
            texts=texts,
            layer=layer,
            pad_id=pad_id,
            on_error=on_error,
            truncate=truncate,
        )
        return self._session.call("encode_text_hidden", timeout_s, embed, texts)

    def class_embeddings(
        self,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> NDArray[np.float32]:
        """Embed labels as classes; those seen before come from memory, or from `cache_dir`.

        Those that are finished when the time is over, or an error ends the call, are kept: calling
        again goes on from there.

        Args:
            labels: Names of the classes, a list as `items` has it.
            templates: Name of a template set, or templates with exactly one `{}`; None is
                "a photo of a {}.".
            dimensions: As for `encode_images`; the prompts are cut before they are averaged.
            timeout_s: For this call; the client's own if None.

        Returns:
            float32 (C, D): for each label the normalised mean of its normalised prompt embeddings.

        Raises:
            TemplateError: a template cannot be used.
            TextError: a label cannot be used; carries its index.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        checked, found = prompts.check_labels(labels), prompts.find_templates(templates)

        kept = self._dimensions if dimensions is None else dimensions
        embed = partial(self._embed_classes, labels=checked, templates=found, dimensions=kept)
        return self._session.call("class_embeddings", timeout_s, embed)

    def zero_shot(
        self,
        images: Images,
        labels: Iterable[str],
        *,
        templates: str | Iterable[str] | None = None,
        none_of_these: bool = False,
        on_error: OnError = "raise",
        dimensions: int | None = None,
        timeout_s: float | None = None,
    ) -> Scores:
        """Say which label fits each image best.

        Args:
            images: As for `encode_images`.
            labels: As for `class_embeddings`; at least one.
            templates: As for `class_embeddings`.
            none_of_these: Add a last label, "none of these", for images that none of the others
                fits. Where the model's score is a softmax, it has the probability of some broad
                background labels, `classification.open_set.BACKGROUND`, which compete with yours.
                Where it is a sigmoid, it has what the best label leaves to 1, and is the answer
                where that is below 0.5; `Scores.above` does the same for any threshold.
            on_error: "raise" the first error, or "skip" images that cannot be used: the scores are
                of the others, and name both.
            dimensions: As for `encode_images`, of images and classes.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the labels; C is one more
            with `none_of_these`.

        Raises:
            ImageError, TextError, TemplateError, InputError: an argument cannot be used.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)
        checked, found = prompts.check_labels(labels), prompts.find_templates(templates)
        if not checked:
            raise InputError("labels is empty; name at least one.")
        if none_of_these:
            open_set.check_labels(checked)

        kept = self._dimensions if dimensions is None else dimensions

        def work(model: Model, deadline: Deadline) -> Scores:
            wanted = checked
            if none_of_these:
                wanted += open_set.background_of(model.manifest.score, checked)
            class_embeddings = self._embed_classes(
                model, deadline, labels=wanted, templates=found, dimensions=kept
            )
            encoded = self._embed_images(
                model, deadline, images=images, on_error=on_error, dimensions=kept
            )
            with telemetry.stage("classify", len(encoded.indices)):
                return open_set.score_images(
                    model.manifest,
                    encoded.embeddings,
                    class_embeddings,
                    checked,
                    none_of_these=none_of_these,
                ).of_items(encoded.indices, encoded.failures)

        return self._session.call("zero_shot", timeout_s, work, images)

    def classify(
        self,
        images: Images,
        probe: Probe,
        *,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score images with a linear classifier fitted on the embeddings of this model.

        Args:
            images: As for `encode_images`.
            probe: What `Probe.load` read, from `training.probe` or `training.few_shot`.
            on_error: As for `zero_shot`.
            timeout_s: For this call; the client's own if None.

        Returns:
            Probabilities and logits, (N, C) each, with the ranking of the probe's labels.

        Raises:
            ImageError: an image cannot be used; carries its index.
            ContractError: the probe was fitted on other weights than the server has.
            ServerError, UnknownModelError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)

        def work(model: Model, deadline: Deadline) -> Scores:
            probe.check_weights(model.manifest.fingerprint, model.manifest.model)
            encoded = self._embed_images(model, deadline, images=images, on_error=on_error)
            with telemetry.stage("classify", len(encoded.indices)):
                return probe.classify(encoded.embeddings).of_items(
                    encoded.indices, encoded.failures
                )

        return self._session.call("classify", timeout_s, work, images)

    def moderate(
        self,
        images: Images,
        policy: Policy,
        *,
        allow_uncalibrated: bool = False,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
    ) -> Moderation:
        """Decide whether images are allowed, reviewed or blocked, by a policy.

        Args:
            images: As for `encode_images`.
            policy: What `Policy.load` read, from `clip-rt calibrate`.
            allow_uncalibrated: Go on with a policy that was not fitted: nothing is known of how
                often it is right.
            on_error: As for `zero_shot`.
            timeout_s: For this call; the client's own if None.

        Returns:
            A decision on each image, with its reasons: label, probability, threshold.

        Raises:
            PolicyError: the policy is not calibrated.
            ContractError: the policy was fitted with other weights than the server has.
            ImageError: an image cannot be used; carries its index.
            ServerError, UnknownModelError, ClientClosedError: see `encode_images`.
        """
        check_on_error(on_error)
        if not isinstance(policy, Policy):
            raise InputError(f"policy is a {type(policy).__name__}; read one with Policy.load().")

        def work(model: Model, deadline: Deadline) -> Moderation:
            manifest = model.manifest
            decisions.check_policy(policy, manifest, allow_uncalibrated=allow_uncalibrated)
            texts = decisions.list_texts(policy, manifest.score)
            text_embeddings = self._embed_classes(
                model, deadline, labels=texts, templates=policy.templates
            )
            encoded = self._embed_images(model, deadline, images=images, on_error=on_error)
            with telemetry.stage("classify", len(encoded.indices)):
                return decisions.decide(
                    policy, manifest, encoded.embeddings, text_embeddings
                ).of_items(encoded.indices, encoded.failures)

        return self._session.call("moderate", timeout_s, work, images)

    def server_seconds(self) -> dict[str, float]:
        """Return what the server has spent on all its clients since it started.

        Returns:
            Seconds by stage, `server_queue` and `server_compute`, both towers and all servers that
            are there together; see `clip_rt.measure(server=...)`.

        Raises:
            InferenceError: the server does not tell.
            ServerError, UnknownModelError, ContractError, ClientClosedError: see `encode_images`.
        """
        return self._session.server_seconds()

    def reload(self, *, timeout_s: float | None = None) -> bool:
        """Take what the repository of the embedded server holds now, without a pause.

        A second server is started, or joined where another process has started it, and calls go
        on with the first until the second is ready. Each call is of one model from begin to end,
        and the first server ends when nobody uses it any more: for a while both are in memory.

        Args:
            timeout_s: Longest time for the new server to answer, once `start_timeout_s` or less
                has been spent on its start; the client's own if None.

        Returns:
            Whether there was anything new.

        Raises:
            InputError: the server is not this client's own.
            ServerStartError, ServerError, ContractError: what is new cannot be used; calls go on
                with the server there was.
        """
        return self._session.reload(timeout_s=timeout_s)

    def close(self) -> None:
        """Close the connection, and end the embedded server when no other client uses it.

        Calls under way in other threads end with `ClientClosedError`. Closing twice is harmless.
        """
        self._session.close()

    def _stream_images(
        self, images: Images, on_error: OnError, timeout_s: float, dimensions: int | None
    ) -> Iterator[Encoded]:
        with self._session.begun(timeout_s) as (model, _):
            yield from embedding.stream_images(
                model, images, on_error, self._image_options, timeout_s, dimensions
            )
