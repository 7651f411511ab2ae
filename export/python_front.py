"""Make what a tower reads of what people have: encoded images, or texts. For Triton ensembles.

In: BYTES `image` (N, 1), a JPEG, PNG, GIF, BMP or WebP file each, or BYTES `text` (N, 1), UTF-8.
Out: uint8 `pixels` (N, S, S, 3) or int32 `tokens` (N, L). The work is done by `clip_rt`, which must
be installed in the server's Python, so that embeddings are those of `clip_rt.Client`. A request
with an unusable item gets an error that names the item, and harms no other. A tokenizer.json comes
from the model beside it that hands it out, at the first text.

Export copies this file verbatim to `<model>/1/model.py`. Read from config.pbtxt: the input and the
output, and the parameters `side_px`, `context_length` and `text_buckets`; for images `max_pixels`
and `max_bytes` too, the largest width x height and encoded size, clip_rt's own where they are not.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils
from dlpack import Loan


class TritonPythonModel:
    """Images or texts to the input of a tower."""

    def initialize(self, args):
        """Import clip_rt; raise, and so fail the load, when it is not there."""
        config = json.loads(args["model_config"])
        self._input, self._output = config["input"][0]["name"], config["output"][0]["name"]
        parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        _check_strings()
        try:
            from clip_rt import errors, specs
            from clip_rt.inputs import images, tokenizer, tokenizer_file
            from clip_rt.wire.manifest import Manifest
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{args['model_name']} prepares its input with clip_rt, and {error}. Install it in "
                "the server's Python: pip install clip-rt"
            ) from error
        self._refusal = errors.ClipRTError
        # Pillow lets go of the interpreter while it decodes and resizes.
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

        manifest = Manifest.from_parameters(parameters, served=args["model_name"])
        names = [name for name in ("max_pixels", "max_bytes") if name in parameters]
        limits = {name: json.loads(parameters[name]) for name in names}

        def to_pixels(item, index):
            size = {"side_px": manifest.side_px, "resizing": manifest.resizing}
            return images.prepare(item, index=index, **size, **limits)

        def to_ids(item, index):
            try:
                text = item.decode()
            except UnicodeDecodeError as error:
                raise errors.TextError(
                    f"text {index} is not UTF-8: {error}.", index=index
                ) from error
            return self._tokenizer.encode_text(text, index=index)

        def to_tokens(ids):
            longest = max(map(len, ids))
            length = min((n for n in manifest.text_buckets if n >= longest), default=longest)
            return tokenizer.pad(ids, length_tokens=length, pad_id=said.pad_id)

        def make_tokenizer():
            if said.kind == "openai":
                return tokenizer.OpenAITokenizer(manifest.context_length)
            num_chunks = -(-said.num_bytes // specs.TOKENIZER_CHUNK_BYTES)
            name = specs.tokenizer_model(manifest.model)
            content = b"".join(_fetch(name, index, specs) for index in range(num_chunks))
            return tokenizer_file.FileTokenizer(
                content, said, context_length=manifest.context_length
            )

        self._tokenizer, self._make_tokenizer = None, make_tokenizer
        said = manifest.tokenization
        is_image = self._output == "pixels"
        self._prepare, self._join = (to_pixels, np.stack) if is_image else (to_ids, to_tokens)

    def execute(self, requests):
        """Prepare the items of all requests side by side; answer each request, in order."""
        if self._output == "tokens" and self._tokenizer is None:
            try:
                # Here and not before: the model that has the file may be loaded after this one.
                self._tokenizer = self._make_tokenizer()
            except (self._refusal, pb_utils.TritonModelException) as error:
                failed = pb_utils.TritonError(str(error), pb_utils.TritonError.UNAVAILABLE)
                return [pb_utils.InferenceResponse(error=failed) for _ in requests]
        waiting = [self._submit(request) for request in requests]
        return [self._answer(futures) for futures in waiting]

    def finalize(self):
        """Let the threads end."""
        self._pool.shutdown()

    def _submit(self, request):
        items = pb_utils.get_input_tensor_by_name(request, self._input).as_numpy().reshape(-1)
        return [
            self._pool.submit(self._prepare, bytes(item), index) for index, item in enumerate(items)
        ]

    def _answer(self, futures):
        try:
            prepared = self._join([future.result() for future in futures])
        except self._refusal as error:
            for future in futures:
                future.cancel()
            refused = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=refused)
        tensor = pb_utils.Tensor.from_dlpack(self._output, Loan(prepared))
        return pb_utils.InferenceResponse(output_tensors=[tensor])


def _fetch(model, index, specs):
    """Return a part of the tokenizer.json that a model of this server hands out."""
    request = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[specs.CHUNK],
        inputs=[pb_utils.Tensor.from_dlpack(specs.CHUNK_INDEX, Loan(np.array([index], np.int32)))],
    )
    response = request.exec()
    if response.has_error():
        raise pb_utils.TritonModelException(
            f"{model} does not hand out its tokenizer.json: {response.error().message()}"
        )
    return np.from_dlpack(pb_utils.get_output_tensor_by_name(response, specs.CHUNK)).tobytes()


def _check_strings():
    """Refuse a NumPy that would end the server at its first string (see `python_dlpack.py`)."""
    probe = pb_utils.Tensor.from_dlpack("probe", Loan(np.array([1, 2], np.int32)))
    if probe.as_numpy().tolist() != [1, 2]:
        raise pb_utils.TritonModelException(
            f"this Triton cannot read strings with NumPy {np.__version__}. Install 'numpy<2' in "
            "the server's Python, run a newer Triton, or remove the folders of the ensembles"
        )
