#!/usr/bin/env bash
# Bring Boreal up on Kubernetes in Docker: three machines in three zones, on this host. Run again, it
# goes on where it was. `make image` must have made boreal:dev.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
overlay=$root/deploy/k8s/overlays/kind
image=boreal:dev
oldest_minor=35 # of Kubernetes: deploy/k8s/base/kustomization.yaml says why

fail() {
  echo "error: $*" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null || fail "$1 is not installed; see $2"
}

need docker https://docs.docker.com/engine/install/
need kind "https://kind.sigs.k8s.io/docs/user/quick-start/#installation (v0.31 or later)"
need kubectl https://kubernetes.io/docs/tasks/tools/
docker info >/dev/null 2>&1 || fail "the Docker engine does not answer; start it, or join its group"
docker image inspect "$image" >/dev/null 2>&1 || fail "there is no image $image; run \`make image\`"

"$root/deploy/k8s/secrets.sh" "$overlay/secrets"
if ! kind get clusters 2>/dev/null | grep -qx boreal; then
  kind create cluster --config "$here/cluster.yaml" --wait 180s
fi
kubectl=(kubectl --context kind-boreal)
minor=$("${kubectl[@]}" get --raw /version | sed -n 's/.*"minor": *"\([0-9]*\).*/\1/p')
[ "${minor:-0}" -ge "$oldest_minor" ] || fail "this cluster runs Kubernetes 1.$minor, and Boreal needs \
1.$oldest_minor; run $here/down.sh, and install kind v0.31 or later"

kind load docker-image "$image" --name boreal
"${kubectl[@]}" apply --kustomize "$overlay"
for workload in statefulset/control statefulset/sn statefulset/db deployment/endpoints; do
  "${kubectl[@]}" --namespace boreal rollout status "$workload" --timeout 600s || fail \
    "$workload is not ready; see: kubectl --context kind-boreal --namespace boreal get pods,events"
done

at="sslmode=verify-full sslrootcert=$overlay/secrets/ca.crt host=localhost user=boreal dbname=postgres"
cat <<END

Boreal is up. As the master user, at the writer and at a reader:
  export PGPASSWORD=\$(cat $overlay/secrets/master-password)
  psql "$at port=55432"
  psql "$at port=55433"
How it is:
  kubectl --context kind-boreal --namespace boreal exec control-0 -- boreal --control 127.0.0.1:7000 status
END
