#!/bin/sh
# On the machine without registry and internet: unpack an archive of bundle.sh, check it, and load its images into Docker.
#
#     sh load.sh ARCHIVE [FOLDER]     into the folder where you are, where not given
#
# Then go to the folder that it names, run deploy/secrets.sh, and docker compose up -d.
set -eu
[ $# -ge 1 ] || { echo "usage: load.sh ARCHIVE [FOLDER]" >&2; exit 2; }
command -v docker >/dev/null || { echo "load.sh needs docker on the PATH" >&2; exit 1; }
folder=${2:-.}
mkdir -p "$folder"
name=$(tar -tzf "$1" | head -n 1 | cut -d / -f 1)
tar -C "$folder" -xzf "$1"
cd "$folder/$name"
sha256sum --quiet --check SHA256SUMS || { echo "load.sh: the archive is damaged" >&2; exit 1; }
docker load --quiet -i images.tar
for image in $(cat images.txt); do docker image inspect "$image" >/dev/null; done
echo "loaded: cd $folder/$name, then deploy/secrets.sh and docker compose up -d"
