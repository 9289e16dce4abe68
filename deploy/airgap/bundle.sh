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
for path in docker-compose.yml .env .dockerignore pyproject.toml README.md LICENSE barrier runner planner deploy; do
    cp -a "$root/$path" "$bundle/"
done
find "$bundle" -name __pycache__ -type d -prune -exec rm -rf {} +
find "$bundle/deploy/secrets" -type f ! -name .gitignore -delete
# What it was made with is what it is run with.
for name in RANKGATE_IMAGE RANKGATE_VERSION STORE_IMAGE BASE BUILD_BASE; do
    sed -i "s|^$name=.*|$name=$(setting $name)|" "$bundle/.env"
done
(cd "$bundle" && find . -type f ! -name SHA256SUMS -exec sha256sum {} + >SHA256SUMS)
tar -C "$room" --owner=0 --group=0 --numeric-owner -c "rankgate-$version" | gzip -1 >"$archive"
echo "$archive: $(du -h "$archive" | cut -f 1), with $images"
