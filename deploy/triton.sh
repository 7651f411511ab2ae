#!/bin/sh
# Runs Triton over $MODEL_REPOSITORY, /models; more options may follow.
#
# A new version is taken by a restart, so that it can be checked before it is asked: model control is
# off. What no client needs answers only to whoever knows a key, and this one nobody knows. Clients
# ask for the list of models by gRPC, so that there it stays open; loading and unloading are off.
#
# Connections end after two minutes, between requests: a client whose address is a name of many
# servers looks it up again only then, and finds those that have come.
set -eu
key=$(od -An -tx1 -N24 /dev/urandom | tr -d ' \n')
off=shared-memory,trace,logging
exec tritonserver \
    --model-repository="${MODEL_REPOSITORY:-/models}" \
    --model-control-mode=none \
    --exit-timeout-secs=30 \
    --allow-metrics=true \
    --metrics-port=8002 \
    --grpc-restricted-protocol="$off:admin-key=$key" \
    --http-restricted-api="$off,model-repository:admin-key=$key" \
    --grpc-max-connection-age=120000 \
    --grpc-max-connection-age-grace=60000 \
    "$@"
