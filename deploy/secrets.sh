#!/bin/sh
# Make the store's users and passwords, and a certificate for TLS, in deploy/secrets (or the folder SECRETS). Existing files stay, so you
# may run it again after a change. To make a file anew, delete it first; afterwards restart the store and all of its clients.
#
#     deploy/secrets.sh [--rank-users]     --rank-users: also one user for each rank, for deploy/compose/rank-users.yml
#
# It needs rankgate on the PATH, or Docker, which runs rankgate from the image. For TLS it also needs openssl.
set -eu
umask 077
here=$(cd "$(dirname "$0")" && pwd)
instance_file=${INSTANCE_FILE:-$here/config/instance.toml}
secrets=${SECRETS:-$here/secrets}
namespace=${RANKGATE_NAMESPACE:-rankgate}
image=${RANKGATE_IMAGE:-rankgate}:${RANKGATE_VERSION:-0.1.0}

value() { sed -n "s/^$1 *= *\"\{0,1\}\([^\"# ]*\)\"\{0,1\}.*/\1/p" "$instance_file"; }
name=$(value name)
world_size=$(value world_size)
mkdir -p "$secrets"
chmod 700 "$secrets"  # rankgate acl takes no folder that others may read
# If docker compose ran before this script, Docker made empty folders in the place of the missing files.
find "$secrets" -mindepth 1 -type d -empty -delete

if command -v rankgate >/dev/null; then
    acl() { rankgate acl --namespace "$namespace" --instance "$name" --passwords "$secrets" "$@"; }
elif command -v docker >/dev/null; then
    docker image inspect "$image" >/dev/null 2>&1 \
        || docker build -q -f "$here/Dockerfile" ${BASE:+--build-arg "BASE=$BASE"} \
            ${BUILD_BASE:+--build-arg "BUILD_BASE=$BUILD_BASE"} -t "$image" "$here/.." >/dev/null
    acl() {
        docker run --rm --network none --user "$(id -u):$(id -g)" --volume "$secrets:/secrets" "$image" \
            acl --namespace "$namespace" --instance "$name" --passwords /secrets "$@"
    }
else
    echo "secrets.sh needs rankgate or docker on the PATH: pip install 'rankgate[cli]', or install Docker" >&2
    exit 1
fi

users=$(acl --admin)
if [ "${1:-}" = --rank-users ]; then
    users="$users
$(acl --role rank --world-size "$world_size")"
fi
printf '%s\n' "$users" >"$secrets/store-users"

if [ ! -s "$secrets/store-cert" ]; then
    if command -v openssl >/dev/null; then
        # A certificate authority for this one server. Its key is deleted.
        key=$(mktemp) && request=$(mktemp) && extensions=$(mktemp)
        trap 'rm -f "$key" "$request" "$extensions"' EXIT
        echo 'subjectAltName=DNS:store,DNS:localhost,IP:127.0.0.1' >"$extensions"
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 3650 -subj '/CN=rankgate store authority' \
            -keyout "$key" -out "$secrets/store-ca" 2>/dev/null
        openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj '/CN=store' \
            -keyout "$secrets/store-key" -out "$request" 2>/dev/null
        openssl x509 -req -in "$request" -CA "$secrets/store-ca" -CAkey "$key" -CAcreateserial -CAserial "$request.serial" \
            -days 3650 -extfile "$extensions" -out "$secrets/store-cert" 2>/dev/null
        rm -f "$request.serial"
    else
        echo "secrets.sh: no openssl here, so profile tls has no certificate" >&2
        for file in store-ca store-key store-cert; do : >"$secrets/$file"; done
    fi
fi

# Containers run as other users, and a mounted file keeps its owner. So all may read the files, but only the owner may open the folder:
# other users of this machine cannot reach the files.
chmod 700 "$secrets"
find "$secrets" -type f ! -name .gitignore -exec chmod 444 {} +
echo "users, passwords and certificate are in $secrets"
