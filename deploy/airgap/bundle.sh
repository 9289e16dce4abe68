#!/bin/sh
# Put everything that a machine without registry and internet needs into one archive:
#
#     deploy/airgap/bundle.sh [ARCHIVE]     rankgate-VERSION-airgap.tar.gz where not given
#
# the image of rankgate, the store's image, the base images and the wheels (to build it anew there), docker-compose.yml, .env and deploy,
# but no secret. Needs a running Docker with rankgate:VERSION; bases.sh, wheels.sh and docker compose build make what is in it.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
setting() { eval "value=\${$1:-}"; [ -n "$value" ] || value=$(sed -n "s/^$1=//p" "$root/.env"); echo "$value"; }
version=$(setting RANKGATE_VERSION)
archive=${1:-rankgate-$version-airgap.tar.gz}
images="$(setting RANKGATE_IMAGE):$version $(setting STORE_IMAGE)"
for base in "$(setting BASE)" "$(setting BUILD_BASE)"; do
    case " $images " in *" $base "*) ;; *) images="$images $base" ;; esac
done
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
bundle=$room/rankgate-$version
mkdir "$bundle"
# shellcheck disable=SC2086 # several words are meant
docker save -o "$bundle/images.tar" $images
echo "$images" >"$bundle/images.txt"
# Listed by name, and code by its kind: a folder would take along passwords and keys that lie in it.
{
    (cd "$root" && find barrier runner planner -type f \( -name '*.py' -o -name '*.lua' -o -name py.typed \))
    (cd "$root" && find deploy/wheels -type f -name '*.whl')
    cat <<'EOF'
docker-compose.yml
.dockerignore
pyproject.toml
README.md
LICENSE
deploy/Dockerfile
deploy/ROLLOUT.md
deploy/airgap/README.md
deploy/airgap/bases.sh
deploy/airgap/bundle.sh
deploy/airgap/load.sh
deploy/airgap/wheels.sh
deploy/build.lock
deploy/compose/rank-users.yml
deploy/config/engine.json
deploy/config/instance.toml
deploy/nixos/rankgate.nix
deploy/requirements.lock
deploy/rolling-update.sh
deploy/secrets.sh
deploy/secrets/.gitignore
deploy/store/store-tls.conf
deploy/store/store.conf
deploy/store/store.sh
deploy/systemd/instance.toml.example
deploy/systemd/planner.env.example
deploy/systemd/rankgate-planner.service
deploy/systemd/rankgate-runner@.service
deploy/systemd/rankgate-runner@.service.d/gpu.conf.example
deploy/systemd/runner.env.example
deploy/wheels/.gitignore
docs/connect.md
docs/deploy.md
docs/engines.md
docs/operate.md
EOF
} >"$room/files"
tar -C "$root" -c -f "$room/files.tar" -T "$room/files"
tar -C "$bundle" -x -p -f "$room/files.tar"
# Of .env only the remarks, and the settings that docker-compose.yml asks for: somebody may keep a password of something else in it.
asked=$(grep -o '\${[A-Z_]*' "$root/docker-compose.yml" | cut -c 3- | sort -u | tr '\n' '|')
grep -E "^(#|\$|(${asked}COMPOSE_PROFILES)=)" "$root/.env" | grep -v '^# *[A-Za-z_]*=' >"$bundle/.env"
# What it was made with is what it is run with.
for name in RANKGATE_IMAGE RANKGATE_VERSION STORE_IMAGE BASE BUILD_BASE; do
    sed -i "s|^$name=.*|$name=$(setting $name)|" "$bundle/.env"
done
(cd "$bundle" && find . -type f ! -name SHA256SUMS -exec sha256sum {} + >SHA256SUMS)
tar -C "$room" --owner=0 --group=0 --numeric-owner -c "rankgate-$version" | gzip -1 >"$archive"
echo "$archive: $(du -h "$archive" | cut -f 1), with $images"
