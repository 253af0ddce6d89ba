#!/usr/bin/env bash
# Remove the cluster that up.sh made, with all its data. The secrets stay for the next one.
set -euo pipefail
if ! command -v kind >/dev/null; then
  echo "error: kind is not installed; see https://kind.sigs.k8s.io/docs/user/quick-start/" >&2
  exit 1
fi
kind delete cluster --name boreal
