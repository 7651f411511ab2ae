# What builds TensorRT engines on the GPU that will serve them: NVIDIA's TensorRT and our export.
#   docker build -f deploy/export.Dockerfile -t clip-rt-export .
# Of the same release as triton.Dockerfile, whose Triton loads only engines of its own TensorRT.
ARG TENSORRT_DIGEST=""
FROM nvcr.io/nvidia/tensorrt:26.11-py3${TENSORRT_DIGEST}

COPY . /source
RUN pip install --no-cache-dir -c /source/constraints.txt "/source[export]" \
    && rm -r /source \
    && useradd --uid 10001 --create-home clip

USER 10001:10001
ENTRYPOINT ["python", "-m", "export.trt"]
