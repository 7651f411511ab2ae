# NVIDIA's Triton over models that clip_rt exported: GPUs by TensorRT, processors by ONNX Runtime.
#   docker build -f deploy/triton.Dockerfile -t clip-rt-triton .
# The base by its digest too: --build-arg TRITON_DIGEST=@sha256:...
ARG TRITON_DIGEST=""
FROM nvcr.io/nvidia/tritonserver:26.11-py3${TRITON_DIGEST}

COPY constraints.txt /tmp/constraints.txt
COPY deploy/triton.sh /opt/clip-rt/triton.sh
RUN pip install --no-cache-dir -c /tmp/constraints.txt onnxruntime openvino \
    && useradd --uid 10001 --create-home clip

USER 10001:10001
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
ENTRYPOINT ["/opt/clip-rt/triton.sh"]
