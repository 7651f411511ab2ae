# NVIDIA's Triton over models that clip_rt exported: GPUs by TensorRT, processors by ONNX Runtime.
#   docker build -f deploy/triton.Dockerfile -t clip-rt-triton .
FROM nvcr.io/nvidia/tritonserver:26.11-py3

COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir -c /tmp/constraints.txt onnxruntime openvino \
    && useradd --uid 10001 --create-home clip

USER 10001
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=6s --start-period=300s \
    CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=poll", "--exit-timeout-secs=30"]
