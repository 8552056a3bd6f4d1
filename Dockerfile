# docker build -t relabel-ffcv .
# docker run --rm --gpus all --shm-size=8g -v /data:/data relabel-ffcv relabel-train --help
#
# The CUDA libraries come with torch and CuPy; the host needs the NVIDIA driver and the NVIDIA Container Toolkit.
FROM python:3.11-slim-bookworm
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PATH=/relabel/.venv/bin:$PATH
WORKDIR /relabel
RUN apt-get update && apt-get install -y --no-install-recommends make
COPY . .
RUN make setup GPU=1 && rm -rf /var/lib/apt/lists/*
