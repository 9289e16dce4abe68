#!/bin/sh
# Make the base images from Debian packages, without a registry:
#
#     rankgate-base         Debian with python3 and tini: what deploy/Dockerfile builds upon
#     rankgate-build-base   the same with python3-venv, for its first stage
#     rankgate-store        Debian with redis-server
#
# Needs root, debootstrap, a running Docker, and a mirror (MIRROR; SUITE is the release).
set -eu
suite=${SUITE:-bookworm}
mirror=${MIRROR:-http://deb.debian.org/debian}
tag=${TAG:-$suite}
for program in debootstrap docker; do
    command -v "$program" >/dev/null || { echo "bases.sh needs $program on the PATH" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "bases.sh must be run as root: debootstrap makes a system's files" >&2; exit 1; }
room=$(mktemp -d)
# In memory where that is allowed: dpkg waits for the disk after every file.
mount -t tmpfs -o size=2g,mode=700 rankgate-bases "$room" 2>/dev/null || true
trap 'umount "$room" 2>/dev/null || rm -rf --one-file-system "$room"; rmdir "$room" 2>/dev/null || true' EXIT
export DEBIAN_FRONTEND=noninteractive

# install ROOT PACKAGE…: with Debian's own tool, inside of ROOT, and without starting anything.
install() {
    root=$1
    shift
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    cp /etc/resolv.conf "$root/etc/resolv.conf"
    chroot "$root" apt-get install -y -q --no-install-recommends -o Dpkg::Use-Pty=0 "$@" >"$room/log" 2>&1 </dev/null \
        || { tail -20 "$room/log" >&2; exit 1; }
    rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf"
}

# image ROOT NAME: without what only a person at a terminal, or the next apt-get, would miss.
image() {
    root=$1
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/cache/debconf/*-old "$root"/var/log/* \
        "$root"/var/lib/dpkg/*-old "$root"/etc/*- \
        "$root"/usr/share/man/* "$root"/usr/share/locale/* "$root"/usr/share/info/* "$root"/usr/share/lintian
    # Licences stay.
    find "$root/usr/share/doc" -type f ! -name copyright -delete
    find "$root/usr/share/doc" -type d -empty -delete
    : >"$root/etc/machine-id"
    tar -C "$root" --numeric-owner --sort=name --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' -c . \
        | docker import --change 'CMD ["/bin/sh"]' - "$2:$tag" >/dev/null
    echo "$2:$tag"
}

debootstrap --variant=minbase "$suite" "$room/minimal" "$mirror" >"$room/log" 2>&1 || { tail -20 "$room/log" >&2; exit 1; }

cp -a "$room/minimal" "$room/store"
install "$room/store" redis-server
mkdir "$room/store/data"
chown 999:999 "$room/store/data" # whom docker-compose.yml runs the store as; the images of Redis and Valkey have it so, too
image "$room/store" rankgate-store

mv "$room/minimal" "$room/base"
install "$room/base" python3 tini
cp -a "$room/base" "$room/build"
image "$room/base" rankgate-base
install "$room/build" python3-venv
image "$room/build" rankgate-build-base
