#!/bin/sh
# Update a running cluster of docker-compose.yml to another version, one container after the other. After each container the script waits
# until the instance serves again. Meanwhile both versions run side by side. To roll back, run it with the old version.
#
#     deploy/rolling-update.sh VERSION      needs the image RANKGATE_IMAGE:VERSION; afterwards set RANKGATE_VERSION in .env
#
# Run it in the project's root. It takes the options of docker compose from COMPOSE_FILE, COMPOSE_PROJECT_NAME and .env.
set -eu
[ $# -eq 1 ] || { echo "usage: deploy/rolling-update.sh VERSION" >&2; exit 2; }
[ -e docker-compose.yml ] || { echo "run it from the folder of docker-compose.yml" >&2; exit 2; }
export RANKGATE_VERSION="$1"
seconds=${SECONDS_PER_RANK:-300}
if [ -z "${COMPOSE:-}" ]; then
    if docker compose version >/dev/null 2>&1; then COMPOSE='docker compose'; else COMPOSE=docker-compose; fi
fi
setting() { eval "value=\${$1:-}"; [ -n "$value" ] || value=$(sed -n "s/^$1=//p" .env); echo "$value"; }
image=$(setting RANKGATE_IMAGE):$1
wanted=$(docker image inspect -f '{{.Id}}' "$image") || { echo "there is no image $image on this machine" >&2; exit 1; }

old() { # the containers of a service that run another image, in order
    for id in $($COMPOSE ps -q "$1"); do
        [ "$(docker inspect -f '{{.Image}}' "$id")" = "$wanted" ] || echo "$id"
    done
}

runners=$($COMPOSE ps -q runner | wc -l)
planners=$($COMPOSE ps -q planner | wc -l)
for service in planner runner; do
    for id in $(old $service); do
        echo "$(docker inspect -f '{{.Name}}' "$id" | cut -c 2-): to $image"
        docker stop -t "$([ $service = runner ] && echo 30 || echo 15)" "$id" >/dev/null
        docker rm "$id" >/dev/null
        # --no-recreate: Compose starts only the missing containers, with the new image. The command names no service, because Compose v2
        # would refuse to scale the others.
        $COMPOSE up -d --no-build --no-recreate --scale "planner=$planners" --scale "runner=$runners" >/dev/null 2>&1
        planner=$($COMPOSE ps -q planner | tail -n 1)
        docker exec "$planner" rankgate launch --yes --file /etc/rankgate/instance.toml --timeout "$seconds"
    done
done
echo "every planner and runner runs $image: set RANKGATE_VERSION=$1 in .env"
