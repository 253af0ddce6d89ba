#!/usr/bin/env bash
# Make what the Secrets of an overlay are generated from: certificates of one authority and the master
# user's password. What is there already stays, but certificates that end soon are issued anew.
#
#   deploy/k8s/secrets.sh DIRECTORY [NAME ...]     further names by which clients know the endpoints
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: $0 DIRECTORY [NAME ...]" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
boreal=${BOREAL:-$root/.venv/bin/boreal}
if [ ! -x "$boreal" ]; then
  echo "error: there is no $boreal; run \`make setup\` in $root first" >&2
  exit 1
fi
directory=$1
shift
names=()
for service in boreal-writer boreal-reader; do
  names+=("$service" "$service.boreal" "$service.boreal.svc" "$service.boreal.svc.cluster.local")
done
names+=("$@")

umask 077
mkdir -p "$directory"
"$boreal" certificates "$directory" \
  --name control --name storage --name compute --name endpoints \
  "${names[@]/#/--server-name=}"
password=$directory/master-password
if [ ! -s "$password" ]; then
  head -c 18 /dev/urandom | base64 | tr '+/' '-_' >"$password.new"
  mv "$password.new" "$password"
fi
