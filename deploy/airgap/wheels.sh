#!/bin/sh
# Fill deploy/wheels with every wheel that deploy/Dockerfile installs, so that the image is built without PyPI. Hashes are checked.
#
#     deploy/airgap/wheels.sh [PYTHON_VERSION [PLATFORM…]]     3.11 and this machine's Linux where not given
#
# Needs pip of Python 3.11 or newer (PYTHON names another interpreter than python3).
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
version=${1:-3.11}
[ $# -eq 0 ] || shift
if [ $# -eq 0 ]; then
    machine=$(uname -m)
    set -- "manylinux_2_28_$machine" "manylinux_2_17_$machine" "manylinux2014_$machine" "manylinux_2_5_$machine" "manylinux1_$machine"
fi
platforms=
for platform; do platforms="$platforms --platform $platform"; done
wheels=$(mktemp -d "$here/wheels/.new.XXXXXX")
trap 'rm -rf "$wheels"' EXIT
for lock in build.lock requirements.lock; do
    # pip judges markers by the Python that it runs with, which may be newer than the image's: take what any 3.11 needs.
    sed 's/ ; python_full_version [^\\]*/ /' "$here/$lock" >"$wheels/$lock"
    # shellcheck disable=SC2086 # several words are meant
    "$python" -m pip --disable-pip-version-check download --quiet --require-hashes --only-binary :all: \
        --implementation cp --python-version "$version" $platforms --dest "$wheels" --requirement "$wheels/$lock"
done
rm -f "$here"/wheels/*.whl
# pip makes files of mkdtemp's mode; the builder must read them.
chmod 644 "$wheels"/*.whl
mv "$wheels"/*.whl "$here/wheels/"
echo "$(find "$here/wheels" -name '*.whl' | wc -l) wheels for Python $version are in $here/wheels"
